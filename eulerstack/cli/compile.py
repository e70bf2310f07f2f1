"""compile: the expanded, normalised stack as JSON, the same bytes for the same stack; loads no torch."""

import hashlib
import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..paths import expand_home
from ..spec import AttentionSpec, BranchedSpec, LayerSpec, Mamba1Spec, StackSpec, ahead, dump, expand, load
from ..spec.base import Block

FORMAT = 1


def compile_(file: str, settings: tuple[str, ...], output: str | None) -> None:
    """Write the compiled stack into a file, or print it."""
    text = json.dumps(compiled(load(file, settings), file, settings), indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        place = expand_home(output)
        place.write_text(text, encoding="utf-8")
        print(f"wrote {place}")


def compiled(spec: StackSpec, source: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """Every layer with all that its template, its entry and the model's widths say, and where that came from."""
    model = spec.model.model_dump(mode="json")
    model |= {"n_kv_heads": spec.model.kv_heads, "head_dim": spec.model.d_model // spec.model.n_heads}
    digest = hashlib.sha256(dump(spec).encode()).hexdigest()
    origin = {
        "source": Path(source).name,
        "settings": list(settings),
        "spec_sha256": digest,
        "eulerstack": version("eulerstack"),
    }
    return {
        "compiled_version": FORMAT,
        "provenance": origin,
        "model": model,
        "tokenizer_contract": spec.tokenizer_contract.model_dump(mode="json"),
        "embedding": spec.embedding.model_dump(mode="json"),
        "layers": [_layer(layer, spec) for layer in expand(spec)],
        "head": {**spec.head.model_dump(mode="json"), "tie_weights": spec.tied},
        "ahead": [[_layer(layer, spec) for layer in module] for module in ahead(spec)],
        "training_hints": spec.training_hints.model_dump(mode="json"),
    }


def _layer(layer: LayerSpec, spec: StackSpec) -> dict[str, Any]:
    """The layer's fields; blocks as mappings."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    data = {key: v.model_dump(mode="json") if isinstance(v, Block) else v for key, v in values.items()}
    data["origin"] = layer.origin.removesuffix(".template")
    data["mixer"] = {"type": data.pop("mixer_type"), **_mixer(layer.mixer, spec)}
    data["ffn"].pop("mlp_ratio", None)
    data["ffn"] |= {"hidden": data.pop("hidden")}
    data["state"] = {"kept": layer.state.kept}
    return data


def _mixer(mixer: Any, spec: StackSpec) -> dict[str, Any]:
    """A mixer's options, those resolved that follow from the model's widths."""
    data: dict[str, Any] = mixer.model_dump(mode="json")
    if isinstance(mixer, BranchedSpec):
        named = mixer.branches.items()
        data["branches"] = {name: {"type": b.type, **_mixer(b.spec, spec)} for name, b in named}
    if isinstance(mixer, Mamba1Spec):
        data["dt_rank"] = mixer.rank(spec.model.d_model)
    if isinstance(mixer, AttentionSpec) and mixer.latent_dim is not None:
        turned = spec.embedding.positional == "rope"
        data["rope_head_dim"] = mixer.rotated_width(spec.model.d_model // spec.model.n_heads, turned)
    return data
