"""StackBuilder: a stack file, written from Python."""

from copy import deepcopy
from typing import Any, Self

import torch

from .model import Stack, build
from .spec import StackSpec, from_data

GATED: dict[str, Any] = {"type": "gated_mlp"}


class StackBuilder:
    """Collects layers; `spec()` is the same StackSpec that a YAML file would give, and `build()` its stack.

        b = StackBuilder(d_model=256, n_heads=4, vocab_size=256, max_seq_len=2048)
        b.add("mamba", {"d_state": 64}).add("retnet").add("attention", {"window": 128}, repeat=2)
        model = b.build()

    Every mistake surfaces in `spec()`, as a SpecError that lists all of them.
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
        tokenizer: dict[str, Any] | None = None,
        embedding: dict[str, Any] | None = None,
        training_hints: dict[str, Any] | None = None,
    ) -> None:
        model = {"name": name, "d_model": d_model, "vocab_size": vocab_size, "max_seq_len": max_seq_len}
        model |= {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "mlp_ratio": mlp_ratio, "dtype": dtype}
        self._data: dict[str, Any] = {
            "schema_version": 1,
            "model": model,
            "tokenizer_contract": {"type": "byte"} if tokenizer is None else tokenizer,
            "embedding": {"type": "learned"} if embedding is None else embedding,
            "layer_templates": {},
            "layer_schedule": [],
            "head": {"type": "causal_lm"},
            "training_hints": {} if training_hints is None else training_hints,
        }

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
        """Append `repeat` layers of a mixer (`attention`, `mamba`, `retnet`) with its options in the YAML's words.

        ffn is a SwiGLU by default; {"type": "none"} leaves it out.
        """
        template: dict[str, Any] = {"mixer": {"type": mixer, mixer: {} if options is None else options}}
        template["ffn"] = GATED if ffn is None else ffn
        parts = {"norm": norm, "residual": residual, "state": state}
        template |= {key: value for key, value in parts.items() if value is not None}
        name = self._named(mixer, deepcopy(template))
        self._data["layer_schedule"].append({"template": name, "repeat": repeat})
        return self

    def _named(self, mixer: str, template: dict[str, Any]) -> str:
        """The name of an equal template, or a new one: retnet, retnet_2, ..."""
        templates: dict[str, Any] = self._data["layer_templates"]
        for name, known in templates.items():
            if known == template:
                return name
        same = sum(known["mixer"]["type"] == mixer for known in templates.values())
        name = f"{mixer}_{same + 1}" if same else mixer
        templates[name] = template
        return name

    def spec(self) -> StackSpec:
        """Raises SpecError."""
        return from_data(self._data)

    def build(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, kernels: str = "auto"
    ) -> Stack:
        return build(self.spec(), device, dtype, kernels)
