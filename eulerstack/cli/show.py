"""explain and estimate: a stack's layers and costs, as tables in the terminal."""

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from ..costs import Estimate, LayerCost
from ..costs import estimate as count
from ..spec import BranchedSpec, LayerSpec, MixerSpec, MoEFFNSpec, NoFFN, StackSpec, load


def explain(file: str, settings: tuple[str, ...]) -> None:
    """The stack as a tree: equal neighbours drawn once, with what each layer costs."""
    spec = load(file, settings)
    cost, console = count(spec), Console()
    console.print(_tree(spec, cost))


def estimate(file: str, settings: tuple[str, ...], batch: int, tokens: int | None) -> None:
    """Parameters and state bytes, exact."""
    spec = load(file, settings)
    cost, tokens = count(spec), tokens or spec.model.max_seq_len
    table = Table(title=f"{spec.model.name}: {batch} x {tokens:,} tokens", title_justify="left")
    table.add_column("what")
    table.add_column("exactly", justify="right")
    table.add_column("about", justify="right")
    table.add_row("parameters", f"{cost.parameters:,}", _short(cost.parameters))
    if cost.active_parameters != cost.parameters:
        table.add_row("parameters a token uses", f"{cost.active_parameters:,}", _short(cost.active_parameters))
    flops = batch * cost.flops(tokens)
    table.add_row("forward FLOPs", f"{flops:,}", _short(flops))
    state = cost.state_bytes(batch, tokens)
    for kind, size in state.items():
        table.add_row(f"state bytes, {kind}", f"{size:,}", _bytes(size))
    Console().print(table)


def _tree(spec: StackSpec, cost: Estimate) -> Tree:
    model = spec.model
    about = f"  ({model.family_hint})" if model.family_hint else ""
    aim = f", target {_short(model.target_params)}" if model.target_params else ""
    tree = Tree(f"[bold]{escape(model.name)}[/]{escape(about)}: {cost.parameters:,} parameters{aim}, {model.dtype}")
    tied = ", tied with the head" if spec.tied else ""
    scale = "" if spec.embedding.scale == 1 else f", times {spec.embedding.scale:g}"
    tree.add(f"embedding {model.vocab_size:,} x {model.d_model}{tied}{scale}; positions: {spec.embedding.positional}")
    layers = tree.add(
        f"{len(cost.layers)} layers, d_model {model.d_model}, {model.n_heads} heads of {model.kv_heads} kv"
    )
    for _, group in groupby(cost.layers, key=lambda c: c.layer.template):
        _add_group(layers, spec, list(group), cost)
    tree.add(f"{cost.layers[-1].layer.norm.type}, head {model.d_model} x {model.vocab_size:,}{_softcap(spec)}")
    if (mtp := spec.head.mtp) is not None:
        what = f"{mtp.n_predict} x {mtp.head_layers} {mtp.head_template} for tokens further ahead"
        tree.add(escape(f"{what}, in training only: their mean loss counts {mtp.train_loss_weight:g}"))
    state = cost.state_bytes(1, model.max_seq_len)
    kinds = ", ".join(f"{kind} {_bytes(size)}" for kind, size in state.items() if kind != "total")
    tree.add(f"state of one row at {model.max_seq_len:,} tokens: {_bytes(state['total'])} ({kinds})")
    return tree


def _softcap(spec: StackSpec) -> str:
    return "" if spec.head.logit_softcap is None else f", logits within {spec.head.logit_softcap:g}"


def _add_group(tree: Tree, spec: StackSpec, group: list[LayerCost], cost: Estimate) -> None:
    first, last, layer = group[0].layer.index, group[-1].layer.index, group[0].layer
    place = f"{first}" if first == last else f"{first}-{last}"
    costs = f"{group[0].parameters:,} parameters, {_short(group[0].flops_per_token)}FLOPs a token"
    kinds = ", ".join(f"{kind} {_bytes(n)}" for kind, n in group[0].state_bytes.items())
    state = f"state {kinds}" if kinds else "keeps no state"
    each = " each" if len(group) > 1 else ""
    branch = tree.add(f"[bold]{place:>5}[/]  {escape(layer.template)}: {costs}, {state}{each}")
    for line in _mixers(layer):
        branch.add(escape(line))
    for choice in cost.stack.blocks[first].mixer.choices:
        branch.add(escape(f"kernels of {choice.operation}: {choice.provider} ({choice.reason})"))
    if not isinstance(layer.ffn, NoFFN):
        branch.add(f"{_ffn(layer)} {layer.ffn.activation}, {spec.model.d_model} to {layer.hidden}")
    scaling = "" if layer.residual.scaling == 1 else f" x {layer.residual.scaling:g}"
    branch.add(f"{layer.norm.position}-{layer.norm.type}, {layer.residual.type} residual{scaling}")


def _mixers(layer: LayerSpec) -> Iterator[str]:
    """A line for the mixer, or one for each of those side by side."""
    if not isinstance(layer.mixer, BranchedSpec):
        yield _mixer(layer.mixer_type, layer.mixer)
        return
    yield f"{len(layer.mixer.branches)} mixers side by side: {layer.mixer.selector.type}"
    for name, branch in layer.mixer.branches.items():
        yield f"{name} is {_mixer(branch.type, branch.spec)}"


def _mixer(kind: str, spec: MixerSpec) -> str:
    return f"{kind}: " + ", ".join(f"{key} {_plain(value)}" for key, value in spec if value is not None)


def _ffn(layer: LayerSpec) -> str:
    if not isinstance(layer.ffn, MoEFFNSpec):
        return layer.ffn.type
    moe = layer.ffn.moe
    shared = f" and {moe.shared_experts} shared" if moe.shared_experts else ""
    return f"moe, {moe.top_k} of {moe.experts} experts{shared},"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
