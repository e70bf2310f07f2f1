"""estimate: what a stack costs, as tables in the terminal or as JSON; and the widths of a fair twin."""

import json
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from ..costs import Estimate
from ..costs import estimate as count
from ..devices import USABLE, Device, find
from ..memory import Precision, Step, TrainingMemory, count_step, grown
from ..spec import Checkpointing, StackSpec, load
from .twin import match as solve
from .words import in_bytes, short

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
POLICIES: tuple[Checkpointing, ...] = get_args(Checkpointing)


def estimate(
    file: str, settings: tuple[str, ...], batch: int, tokens: int | None, device: str | None, precision: Precision,
    match: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Parameters, state and FLOPs, exact; the memory of a training step, counted; what fits a device."""
    if match is not None:
        twin = solve(file, settings, match)
        print(json.dumps(twin._asdict(), indent=2) if as_json else twin)
        return
    spec = load(file, settings)
    found = figures(spec, batch, tokens or spec.model.max_seq_len, device, precision)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console().print(_table(found))


def figures(spec: StackSpec, batch: int, tokens: int, device: str | None, precision: Precision) -> dict[str, Any]:
    """Everything `estimate` tells, as plain data; bytes, and FLOPs of the whole batch. Raises ValueError."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    card, cost = None if device is None else find(device), count(spec)
    step = count_step(spec, batch, tokens, precision, "cpu" if card is None else "cuda")
    policies = {policy: _parts(step.memory(policy)) for policy in POLICIES}
    forward, training = cost.flops(tokens), 3 * cost.stack.flops(tokens, training=True)
    found = {
        "name": spec.model.name,
        "batch": batch,
        "tokens": tokens,
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "forward_flops": batch * forward,
        "training_flops": batch * training,
        "training_flops_per_token": training / tokens,
        "precision": precision,
        "checkpointing": spec.training_hints.checkpointing,
        "training_memory": policies,
        "state_bytes": cost.state_bytes(batch, tokens),
        "weight_bytes": cost.weight_bytes,
    }
    if card is None:
        return found
    more = count_step(spec, batch + 1, tokens, precision, "cuda")
    speed = {"tokens_per_second_at_half_rate": card.flops / 2 / (training / tokens)}
    return {**found, "device": {"name": device, **_fit(card, found, cost, step, more), **speed}}


def _parts(memory: TrainingMemory) -> dict[str, int]:
    return {**vars(memory), "total": memory.total}


def _fit(card: Device, found: dict[str, Any], cost: Estimate, step: Step, more: Step) -> dict[str, Any]:
    """What the device holds; `more` is the step of one row more."""
    room, policy = round(card.memory * USABLE), found["checkpointing"]

    def trains(rows: int) -> int:
        return grown(step, more, rows - found["batch"]).memory(policy).total

    state, left = cost.state_bytes(1, found["tokens"])["total"], room - found["weight_bytes"]
    return {
        "memory": card.memory,
        "usable": room,
        "largest_training_batch": bisect_right(range(1, 1 << 24), room, key=trains),
        "largest_inference_batch": 0 if left < 0 else None if state == 0 else left // state,
    }


def _table(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['name']}: {found['batch']} x {found['tokens']:,} tokens", title_justify="left")
    for column in ("what", "exactly", "about"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def row(what: str, number: float, unit: Callable[[float], str] = short) -> None:
        table.add_row(what, f"{number:,.0f}", unit(number))

    row("parameters", found["parameters"])
    if found["active_parameters"] != found["parameters"]:
        row("parameters a token uses", found["active_parameters"])
    row("forward FLOPs", found["forward_flops"])
    row("training FLOPs", found["training_flops"])
    row("training FLOPs a token", found["training_flops_per_token"])
    table.add_section()
    policy = found["checkpointing"]
    for part, size in found["training_memory"][policy].items():
        row(f"training bytes, {part}", size, in_bytes)
    for other in (name for name in POLICIES if name != policy):
        for part in ("activations", "total"):
            row(f"{part} with checkpointing {other}", found["training_memory"][other][part], in_bytes)
    table.add_section()
    row("inference bytes, weights", found["weight_bytes"], in_bytes)
    for kind, size in found["state_bytes"].items():
        row(f"state bytes, {kind}", size, in_bytes)
    if "device" in found:
        _device(table, found["device"])
    kernels = ", by PyTorch's kernels" if "device" in found else ""
    table.caption = f"training in {found['precision']}{kernels}; what operations allocate inside themselves is left out"
    return table


def _device(table: Table, device: dict[str, Any]) -> None:
    table.add_section()
    table.add_row(f"{device['name']}: bytes for tensors", f"{device['usable']:,}", in_bytes(device["usable"]))
    for work in ("training", "inference"):
        rows = device[f"largest_{work}_batch"]
        table.add_row(f"{device['name']}: rows that fit, {work}", "any" if rows is None else f"{rows:,}", "")
    speed = device["tokens_per_second_at_half_rate"]
    table.add_row(f"{device['name']}: tokens a second at 50 % MFU", f"{speed:,.0f}", short(speed))
