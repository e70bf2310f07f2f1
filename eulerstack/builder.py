"""StackBuilder: a stack file, written from Python."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import count
from typing import Any, Self

import torch

from .model import Stack, build
from .spec import StackSpec, from_data

GATED: dict[str, Any] = {"type": "gated_mlp"}


class StackBuilder:
    """Collects templates and layers; `spec()` is the StackSpec that the same YAML file would give, `build()` its stack.

        b = StackBuilder(d_model=256, n_heads=4, embedding={"positional": "none"})
        b.add("mamba", {"d_state": 64}).add("retnet").add("attention", {"window": 128}, repeat=2)
        model = b.build()

    or, as a file would say it, with names of one's own:

        b.template("m", mixer="mamba").template("a", mixer={"type": "attention", "attention": {"window": 128}})
        b.layers("m m a", repeat=4).layers("a", override={"attention": {"window": None}})
        b.set(let={"rate": 3e-4}, training_hints={"lr_peak": "${let.rate}"})

    Keys and values are the file's, and so are the checks: every mistake surfaces in `spec()`, as a SpecError that
    lists all of them.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        vocab_size: int = 256,
        max_seq_len: int = 2048,
        *,
        n_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        name: str = "stack",
        dtype: str = "float32",
        **blocks: dict[str, Any] | None,
    ) -> None:
        """`blocks` are the file's other blocks, as `set` takes them: embedding, head ...; None says nothing."""
        model = {"name": name, "d_model": d_model, "vocab_size": vocab_size, "max_seq_len": max_seq_len}
        model |= {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "mlp_ratio": mlp_ratio, "dtype": dtype}
        self._data: dict[str, Any] = {
            "schema_version": 1,
            "model": model,
            "tokenizer_contract": {"type": "byte"},
            "embedding": {"type": "learned"},
            "layer_templates": {},
            "layer_schedule": [],
            "head": {"type": "causal_lm"},
        }
        self.set(**{name: block for name, block in blocks.items() if block is not None})

    def set(self, **blocks: Any) -> Self:
        """Blocks of the file by their names, their keys laid over those that are there."""
        for name, value in deepcopy(blocks).items():
            there = self._data.get(name)
            self._data[name] = there | value if isinstance(there, dict) and isinstance(value, dict) else value
        return self

    def template(self, name: str, mixer: str | dict[str, Any], **parts: Any) -> Self:
        """A layer template: its mixer, and ffn (a SwiGLU unless given), norm, residual, state ... as the file has them.

        A word stands for the mapping {"type": word}. Raises ValueError for a name that is taken.
        """
        if name in self._data["layer_templates"]:
            raise ValueError(f"layer_templates.{name} is there already; give the template another name")
        parts = {"mixer": mixer, "ffn": GATED, **parts}
        words = {key: {"type": part} for key, part in parts.items() if isinstance(part, str)}
        self._data["layer_templates"][name] = deepcopy(parts | words)
        return self

    def layers(self, what: str | Sequence[Any], repeat: int = 1, **keys: Any) -> Self:
        """Append an entry of the schedule: a template by its name, or a pattern (`m r m a`, or a list as in the file).

        keys: the entry's others, such as override and shared.
        """
        kind = "template" if isinstance(what, str) and len(what.split()) == 1 else "pattern"
        self._data["layer_schedule"].append(deepcopy({kind: what, "repeat": repeat, **keys}))
        return self

    def add(
        self,
        mixer: str,
        options: dict[str, Any] | None = None,
        *,
        repeat: int = 1,
        ffn: dict[str, Any] | None = None,
        norm: dict[str, Any] | None = None,
        residual: dict[str, Any] | None = None,
        state: dict[str, Any] | None = None,
    ) -> Self:
        """Append `repeat` layers of a mixer (`attention`, `mamba`, `retnet` ...) with its options in the file's words.

        Their template gets a name of its own: retnet, retnet_2 ... ffn is a SwiGLU by default; {"type": "none"} leaves
        it out.
        """
        parts = {"ffn": ffn, "norm": norm, "residual": residual, "state": state}
        given = {key: value for key, value in parts.items() if value is not None}
        template = {"mixer": {"type": mixer, mixer: options or {}}, "ffn": GATED, **given}
        templates = self._data["layer_templates"]
        names = (mixer if n == 1 else f"{mixer}_{n}" for n in count(1))
        name = next(name for name in names if templates.get(name, template) == template)
        if name not in templates:
            self.template(name, **template)
        return self.layers(name, repeat)

    def spec(self) -> StackSpec:
        """Raises SpecError."""
        return from_data(self._data, "StackBuilder")

    def build(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, kernels: str = "auto"
    ) -> Stack:
        return build(self.spec(), device, dtype, kernels)
