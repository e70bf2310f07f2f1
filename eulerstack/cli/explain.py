"""explain: a stack as a tree in the terminal, or as a picture."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from ..costs import Estimate, LayerCost
from ..costs import estimate as count
from ..paths import expand_home
from ..spec import StackSpec, load
from .picture import drawn_as, page_for, svg, uses
from .words import (
    Repeated,
    ffn_line,
    in_bytes,
    mixer_lines,
    norm_line,
    one_round,
    override_line,
    pattern,
    repeats,
    runs,
    short,
)


def explain(file: str, settings: tuple[str, ...], picture: str | None) -> None:
    """The stack with its repeats drawn once, and what each layer costs; in the terminal, or into a picture's file."""
    spec = load(file, settings)
    if picture is None:
        Console().print(_tree(spec, count(spec)))
        return
    place = expand_home(picture)
    page = page_for(place)
    place.write_text(page(svg(spec, count(spec))), encoding="utf-8")
    print(f"wrote {place}")


def _tree(spec: StackSpec, cost: Estimate) -> Tree:
    tree = Tree(_title(spec, cost))
    for line in _before(spec):
        tree.add(escape(line))
    heads = f"{spec.model.n_heads} heads of {spec.model.kv_heads} kv"
    line = pattern([c.layer for c in cost.layers])
    layers = tree.add(f"{len(cost.layers)} layers, d_model {spec.model.d_model}, {heads}: [bold]{escape(line)}[/]")
    told: dict[str, int] = {}
    for part in repeats(cost.layers, drawn_as(cost)):
        _add_part(layers, part, cost, told)
    for line in _after(spec, cost):
        tree.add(escape(line))
    kernels = tree.add("kernels")
    for choice in dict.fromkeys(c[:2] + c[3:] for block in cost.stack.blocks for c in block.choices):
        kernels.add(escape("{}: {} ({})".format(*choice)))
    return tree


def _title(spec: StackSpec, cost: Estimate) -> str:
    model = spec.model
    about = f"  ({model.family_hint})" if model.family_hint else ""
    aim = f", target {short(model.target_params)}" if model.target_params else ""
    idle = cost.active_parameters != cost.parameters
    active = f", {short(cost.active_parameters, 'TBMk')} of them for a token" if idle else ""
    flops = f"{short(cost.flops(model.max_seq_len) / model.max_seq_len)}FLOPs a token"
    counted = f"{cost.parameters:,} parameters{active}{aim}, {flops}, {model.dtype}"
    return f"[bold]{escape(model.name)}[/]{escape(about)}: {counted}"


def _before(spec: StackSpec) -> Iterator[str]:
    tied = ", tied with the head" if spec.tied else ""
    scale = "" if spec.embedding.scale == 1 else f", times {spec.embedding.scale:g}"
    widths = f"{spec.model.vocab_size:,} x {spec.model.d_model}"
    yield f"embedding {widths}{tied}{scale}; positions: {spec.embedding.positional}"
    if spec.model.mup is not None:
        base = spec.model.base
        yield f"muP: the learning rates of d_model {base.d_model} with {base.n_heads} heads"


def _after(spec: StackSpec, cost: Estimate) -> Iterator[str]:
    model, cap = spec.model, spec.head.logit_softcap
    within = "" if cap is None else f", logits within {cap:g}"
    yield f"{cost.layers[-1].layer.norm.type}, head {model.d_model} x {model.vocab_size:,}{within}"
    if (mtp := spec.head.mtp) is not None:
        what = f"{mtp.n_predict} x {mtp.head_layers} {mtp.head_template} for tokens further ahead"
        yield f"{what}, in training only: their mean loss counts {mtp.train_loss_weight:g}"
    state = cost.state_bytes(1, model.max_seq_len)
    kinds = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in state.items() if kind != "total")
    yield f"state of one row at {model.max_seq_len:,} tokens: {in_bytes(state['total'])} ({kinds})"


def _add_part(tree: Tree, part: Repeated[LayerCost], cost: Estimate, told: dict[str, int]) -> None:
    """A layer, or a pattern with its rounds in front. `told` are the layers that were described, by what they are."""
    length, key = len(part.items), drawn_as(cost)
    if length > 1 and part.times > 1:
        first = part.items[0].layer.index
        places = f"layers {first}-{first + length * part.times - 1}"
        tree = tree.add(f"[bold]{part.times} x[/] \\[{escape(one_round([c.layer for c in part.items]))}]  {places}")
    for run in runs(part.items, key):
        layer, times = run[0].layer, part.times * len(run) if length == 1 else len(run)
        place = f"{layer.index}" if times == 1 else f"{layer.index}-{layer.index + times - 1}"
        like = told.setdefault(key(run[0]), layer.index)
        as_before = "" if like == layer.index else f", as layer {like}"
        branch = tree.add(f"[bold]{place:>5}  {escape(layer.template)}[/]{as_before}")
        for line in [] if as_before else _about(run[0], cost, times):
            branch.add(escape(line))


def _about(one: LayerCost, cost: Estimate, times: int) -> Iterator[str]:
    """What a layer costs and is, `times` of them in a row."""
    layer, sharing = one.layer, uses(cost)[one.layer.weights_of]
    kinds = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in one.state_bytes.items())
    costs = f"{one.parameters:,} parameters, {short(one.flops_per_token)}FLOPs a token"
    yield f"{costs}, {f'state {kinds}' if kinds else 'keeps no state'}{' each' if times > 1 else ''}"
    yield from mixer_lines(layer)
    yield f"{ffn_line(layer, cost.stack.spec.model.d_model)}; {norm_line(layer)}"
    entry = layer.origin.removesuffix(".template")
    yield f"named by {entry}" + ("" if layer.override is None else f", whose override has {override_line(layer)}")
    if sharing > 1:
        yield f"one set of weights for {sharing} layers, counted once"
