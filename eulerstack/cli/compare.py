"""diff: what two stacks differ in as design decisions; torch is loaded only to count two that differ."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..spec import BranchedSpec, LayerSpec, NoFFN, StackSpec, ahead, expand, load
from .words import count_mixers, design, ffn_name, in_bytes, mixer_name, norm_line, pattern, plain, short

Rows = dict[str, str]
CONTEXT = 8192
SAID_ELSEWHERE = {
    "name",
    "family_hint",
    "target_params",
    "mlp_ratio",
    "n_kv_heads",
    "tie_weights",
    "head_template",
    "mup",
}


def compare(first: str, second: str, settings: tuple[str, ...]) -> None:
    """A table of the decisions that differ, with what they cost."""
    specs = load(first), load(second, settings)
    rows = differences(*specs)
    if not rows:
        print(f"{specs[0].model.name} and {specs[1].model.name} are the same design")
        return
    table = Table(box=None, pad_edge=False)
    names = [spec.model.name for spec in specs]
    for name in ("", names[0], names[1] if names[0] != names[1] else f"{second} {' '.join(settings)}"):
        table.add_column(escape(name), overflow="fold")
    for name, (one, other) in {**rows, **_figures(*specs)}.items():
        table.add_row(name, escape(one), escape(other))
    Console().print(table)


def differences(one: StackSpec, other: StackSpec) -> dict[str, tuple[str, str]]:
    """The decisions that differ, by name; none for two stacks that build the same and train the same."""
    mine, yours = decisions(one), decisions(other)
    rows = {key: (mine[key], yours[key]) for key in mine if key in yours and mine[key] != yours[key]}
    places = _places(_all_layers(one), _all_layers(other))
    return {**rows, "layers that differ": (places, places)} if places else rows


def _all_layers(spec: StackSpec) -> list[LayerSpec]:
    return [*expand(spec), *(layer for module in ahead(spec) for layer in module)]


def decisions(spec: StackSpec) -> Rows:
    """What was decided, by name, in words. Options of mixers and FFNs stand there if the stack has one of the kind."""
    layers = expand(spec)
    rows = {"layers": str(len(layers)), "mixers": _counted(count_mixers(layers)), "order": pattern(layers)}
    rows |= _flat("model", spec.model)
    base = spec.model.base
    rows["muP"] = "none" if spec.model.mup is None else f"from d_model {base.d_model}, {base.n_heads} heads"
    rows["heads of keys and values"] = str(spec.model.kv_heads)
    rows |= {key: ", ".join(values) for key, values in _options(layers).items()}
    rows["FFNs"] = _counted(Counter(_ffn(layer) for layer in layers))
    rows["norms and residuals"] = _counted(Counter(norm_line(layer) for layer in layers))
    rows["layers without state"] = str(sum(not layer.state.kept for layer in layers))
    rows["sets of weights"] = str(len({layer.weights_of for layer in layers}))
    for part in ("tokenizer_contract", "embedding", "head", "training_hints"):
        rows |= _flat(part, getattr(spec, part))
    return rows


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _flat(prefix: str, block: Any) -> Rows:
    """The keys of a block and of those in it, dotted."""
    rows: Rows = {}
    for key, value in block:
        if key in SAID_ELSEWHERE:
            continue
        if hasattr(type(value), "model_fields"):
            rows |= _flat(f"{prefix}.{key}", value)
        else:
            rows[f"{prefix}.{key}"] = plain(value)
    return rows


def _options(layers: Sequence[LayerSpec]) -> dict[str, list[str]]:
    """The values that each key of each mixer and FFN has in the stack, each once, in the order of the layers."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        for key, value in _layer_options(layer):
            values = found.setdefault(key, [])
            if value not in values:
                values.append(value)
    return found


def _layer_options(layer: LayerSpec) -> Iterator[tuple[str, str]]:
    if isinstance(layer.mixer, BranchedSpec):
        yield "branched.selector", layer.mixer.selector.type
        named = [(branch.type, branch.spec) for branch in layer.mixer.branches.values()]
    else:
        named = [(layer.mixer_type, layer.mixer)]  # type: ignore[list-item]
    for kind, spec in named:
        yield from _flat(mixer_name(kind, spec).partition("(")[0], spec).items()
    yield from _flat(layer.ffn.type, layer.ffn).items()


def _ffn(layer: LayerSpec) -> str:
    if isinstance(layer.ffn, NoFFN):
        return "none"
    return f"{ffn_name(layer).replace(',', '')} {layer.ffn.activation} of {layer.hidden}"


def _places(one: Sequence[LayerSpec], other: Sequence[LayerSpec]) -> str:
    """The layers that are not the same in both, where there are equally many; those that share are the same sharers."""
    if len(one) != len(other):
        return ""
    pairs = zip(one, other, strict=True)
    differ = [str(a.index) for a, b in pairs if design(a) != design(b) or a.weights_of != b.weights_of]
    return f"all {len(one)}" if len(differ) == len(one) else ", ".join(differ)


def _figures(one: StackSpec, other: StackSpec) -> dict[str, tuple[str, str]]:
    """What both cost, counted."""
    from ..costs import estimate

    tokens = min(CONTEXT, one.model.max_seq_len, other.model.max_seq_len)
    columns = []
    for cost in (estimate(one), estimate(other)):
        state, flops = cost.state_bytes(1, tokens)["total"], cost.flops(tokens) / tokens
        columns.append((f"{cost.parameters:,}", f"{cost.active_parameters:,}", in_bytes(state), short(flops).strip()))
    names = ("parameters", "parameters a token uses", f"state at {tokens:,} tokens", "FLOPs a token")
    pairs = dict(zip(names, zip(*columns, strict=True), strict=True))
    if pairs[names[0]] == pairs[names[1]]:
        del pairs[names[1]]
    return pairs
