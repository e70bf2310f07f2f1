"""Words for layers and figures, and the repeats of a stack; loads no torch."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..spec import AttentionSpec, BranchedSpec, LayerSpec, Mamba1Spec, Mamba2Spec, MoEFFNSpec, NoFFN

T = TypeVar("T")
LONGEST_PATTERN = 64


@dataclass(frozen=True)
class Repeated(Generic[T]):
    """`times` rounds of the same items; these are the first round's."""

    times: int
    items: tuple[T, ...]


def repeats(items: Sequence[T], key: Callable[[T], object]) -> list[Repeated[T]]:
    """The items as rounds of equal keys: m m a m m a r is 2 x [m m a], 1 x [r]."""
    numbers: dict[object, int] = {}
    keys = [numbers.setdefault(key(item), len(numbers)) for item in items]
    parts: list[Repeated[T]] = []
    start = 0
    while start < len(items):
        length, times = _longest(keys, start)
        part = Repeated(times, tuple(items[start : start + length]))
        if times == 1 and parts and parts[-1].times == 1:
            part = Repeated(1, (*parts.pop().items, *part.items))
        parts.append(part)
        start += length * times
    return parts


def _longest(keys: list[int], start: int) -> tuple[int, int]:
    """The pattern that covers most from `start`, the shortest of them: its length, and how often it stands there."""
    best = (1, 1)
    for length in range(1, min(LONGEST_PATTERN, (len(keys) - start) // 2) + 1):
        end = start + length
        while end < len(keys) and keys[end] == keys[end - length]:
            end += 1
        times = (end - start) // length
        if times > 1 and times * length > best[0] * best[1]:
            best = (length, times)
    return best


def pattern(layers: Sequence[LayerSpec]) -> str:
    """The stack in a line: 8 x [mamba2 mamba2 mamba2 attention]."""
    return ", ".join(_rounds(part) for part in repeats(layers, layer_name))


def _rounds(part: Repeated[LayerSpec]) -> str:
    if part.times == 1:
        return ", ".join(_run(run) for run in runs(part.items, layer_name))
    line = one_round(part.items)
    return f"{part.times} x {line}" if len(part.items) == 1 else f"{part.times} x [{line}]"


def one_round(layers: Sequence[LayerSpec]) -> str:
    """The layers that a bracket holds: mamba2 mamba2 mamba2 attention; a long run is counted."""
    names = [_run(run) for run in runs(layers, layer_name)]
    return (", " if any(" x " in name for name in names) else " ").join(names)


def _run(run: list[LayerSpec]) -> str:
    name = layer_name(run[0])
    return " ".join([name] * len(run)) if len(run) <= 4 else f"{len(run)} x {name}"


def runs(items: Sequence[T], key: Callable[[T], object]) -> list[list[T]]:
    """Equal neighbours together."""
    found: list[list[T]] = []
    for item in items:
        if found and key(found[-1][0]) == key(item):
            found[-1].append(item)
        else:
            found.append([item])
    return found


def design(layer: LayerSpec) -> str:
    """What a layer is, wherever it stands: its template's name and its place in the file left out."""
    return repr((layer.mixer_type, layer.mixer, layer.ffn, layer.hidden, layer.norm, layer.residual, layer.state.kept))


def layer_name(layer: LayerSpec) -> str:
    """The mixer, and the FFN where it is no plain one: mamba2, attention+moe."""
    name = mixer_name(layer.mixer_type, layer.mixer)
    if isinstance(layer.ffn, MoEFFNSpec):
        return f"{name}+moe"
    return name


def mixer_name(kind: str, spec: Any) -> str:
    """The family of a mixer in a word or two: mamba2, attention (512) for a window, retnet."""
    if isinstance(spec, BranchedSpec):
        return " | ".join(mixer_name(branch.type, branch.spec) for branch in spec.branches.values())
    if isinstance(spec, Mamba1Spec | Mamba2Spec):
        return spec.variant
    if isinstance(spec, AttentionSpec):
        window = "" if spec.window is None else f"({spec.window})"
        return ("attention" if spec.latent_dim is None else "latent_attention") + window
    return kind


def count_mixers(layers: Sequence[LayerSpec]) -> Counter[str]:
    """How many layers mix with what, windows left out: 24 mamba2, 8 attention."""
    return Counter(re.sub(r"\(\d+\)", "", mixer_name(layer.mixer_type, layer.mixer)) for layer in layers)


def mixer_lines(layer: LayerSpec) -> Iterator[str]:
    """A line for the mixer, or one for each of those side by side."""
    if not isinstance(layer.mixer, BranchedSpec):
        yield _mixer(layer.mixer_type, layer.mixer)
        return
    yield f"{len(layer.mixer.branches)} mixers side by side: {layer.mixer.selector.type}"
    for name, branch in layer.mixer.branches.items():
        yield f"{name} is {_mixer(branch.type, branch.spec)}"


def _mixer(kind: str, spec: Any) -> str:
    return f"{kind}: " + options(spec)


def options(spec: Any) -> str:
    """The keys of a block and their values, unset ones left out."""
    return ", ".join(f"{key} {plain(value)}" for key, value in spec if value is not None)


def ffn_line(layer: LayerSpec, width: int) -> str:
    """The FFN with its widths: gated_mlp swiglu, 1024 to 4096."""
    if isinstance(layer.ffn, NoFFN):
        return "no FFN"
    return f"{ffn_name(layer)} {layer.ffn.activation}, {width} to {layer.hidden}"


def ffn_name(layer: LayerSpec) -> str:
    """The FFN in a word, or a mixture of experts in a few."""
    if not isinstance(layer.ffn, MoEFFNSpec):
        return layer.ffn.type
    moe = layer.ffn.moe
    shared = f" and {moe.shared_experts} shared" if moe.shared_experts else ""
    return f"moe, {moe.top_k} of {moe.experts} experts{shared},"


def norm_line(layer: LayerSpec) -> str:
    """How the layer is normed and added."""
    scaling = "" if layer.residual.scaling == 1 else f" x {layer.residual.scaling:g}"
    return f"{layer.norm.position}-{layer.norm.type}, {layer.residual.type} residual{scaling}"


def override_line(layer: LayerSpec) -> str:
    """What the layer has instead of its template's values: attention.window 512."""
    return "" if layer.override is None else ", ".join(_flat(layer.override.given(), ""))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} {plain(value)}"


def plain(value: object) -> str:
    """A value as YAML has it; the keys of a block in brackets."""
    if value is None:
        return "null"
    if hasattr(type(value), "model_fields"):
        return f"({options(value)})"
    return str(value).lower() if isinstance(value, bool) else str(value)


def short(number: float, units: str = "TGMk") -> str:
    """Three digits and a unit: 1.34 G; units names those of 1e12, 1e9, 1e6 and 1e3."""
    for unit, size in zip(units, (1e12, 1e9, 1e6, 1e3), strict=True):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def in_bytes(number: float) -> str:
    """Three digits and a unit: 12.6 MiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
