"""estimate: what a stack costs, as a table in the terminal."""

from rich.console import Console
from rich.table import Table

from ..costs import estimate as count
from ..spec import load
from .words import in_bytes, short


def estimate(file: str, settings: tuple[str, ...], batch: int, tokens: int | None) -> None:
    """Parameters and state bytes, exact."""
    spec = load(file, settings)
    cost, tokens = count(spec), tokens or spec.model.max_seq_len
    table = Table(title=f"{spec.model.name}: {batch} x {tokens:,} tokens", title_justify="left")
    table.add_column("what")
    table.add_column("exactly", justify="right")
    table.add_column("about", justify="right")
    table.add_row("parameters", f"{cost.parameters:,}", short(cost.parameters))
    if cost.active_parameters != cost.parameters:
        table.add_row("parameters a token uses", f"{cost.active_parameters:,}", short(cost.active_parameters))
    flops = batch * cost.flops(tokens)
    table.add_row("forward FLOPs", f"{flops:,}", short(flops))
    state = cost.state_bytes(batch, tokens)
    for kind, size in state.items():
        table.add_row(f"state bytes, {kind}", f"{size:,}", in_bytes(size))
    Console().print(table)
