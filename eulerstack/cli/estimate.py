"""estimate: what a stack costs, as tables in the terminal or as JSON; and the widths of a fair twin."""

import json
from collections.abc import Callable
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from ..costs import Estimate
from ..costs import estimate as count
from ..devices import USABLE, Device, find
from ..memory import Precision, TrainingMemory, count_step
from ..spec import StackSpec, load
from .twin import match as solve
from .words import in_bytes, short

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def estimate(
    file: str, settings: tuple[str, ...], batch: int, tokens: int | None, device: str | None, precision: Precision,
    match: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Parameters, state and FLOPs, exact; the memory of a training step, counted; what fits a device."""
    if match is not None:
        print(solve(file, settings, match))
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
    again = spec.training_hints.checkpointing == "block"
    step = count_step(spec, batch, tokens, precision, "cpu" if card is None else "cuda")
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
        "training_memory": {"precision": precision, "checkpointing": again, **_parts(step.memory(again))},
        "training_memory_checkpointed": step.memory(True).total,
        "state_bytes": cost.state_bytes(batch, tokens),
        "weight_bytes": _weight_bytes(cost, spec.model.dtype),
    }
    return found if card is None else {**found, "device": _fit(spec, cost, card, tokens, precision, training, device)}


def _parts(memory: TrainingMemory) -> dict[str, int]:
    return {**vars(memory), "total": memory.total}


def _weight_bytes(cost: Estimate, dtype: str) -> int:
    """Of the weights at inference, in the model's dtype."""
    return cost.parameters * (4 if dtype == "float32" else 2)


def _fit(
    spec: StackSpec, cost: Estimate, card: Device, tokens: int, precision: Precision, flops: int, name: str | None
) -> dict[str, Any]:
    """What the device can hold and, at half its matmul rate, do. Training memory grows evenly by the row."""
    room, again = round(card.memory * USABLE), spec.training_hints.checkpointing == "block"
    one, two = (count_step(spec, rows, tokens, precision, "cuda").memory(again).total for rows in (1, 2))
    state = cost.state_bytes(1, tokens)["total"]
    left = room - _weight_bytes(cost, spec.model.dtype)
    return {
        "name": name,
        "memory": card.memory,
        "usable": room,
        "largest_training_batch": max(0, (room - one) // (two - one) + 1),
        "largest_inference_batch": 0 if left < 0 else None if state == 0 else left // state,
        "tokens_per_second_at_half_rate": card.flops / 2 / (flops / tokens),
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
    training = found["training_memory"]
    for part in ("weights", "gradients", "optimizer", "activations", "work", "total"):
        row(f"training bytes, {part}", training[part], in_bytes)
    row("training bytes, total, with checkpointing", found["training_memory_checkpointed"], in_bytes)
    table.add_section()
    row("inference bytes, weights", found["weight_bytes"], in_bytes)
    for kind, size in found["state_bytes"].items():
        row(f"state bytes, {kind}", size, in_bytes)
    if "device" in found:
        _device(table, found["device"])
    table.caption = f"training in {training['precision']}; what operations allocate inside themselves is not counted"
    return table


def _device(table: Table, device: dict[str, Any]) -> None:
    table.add_section()
    table.add_row(f"{device['name']}: bytes for tensors", f"{device['usable']:,}", in_bytes(device["usable"]))
    for work in ("training", "inference"):
        rows = device[f"largest_{work}_batch"]
        table.add_row(f"{device['name']}: rows that fit, {work}", "any" if rows is None else f"{rows:,}", "")
    speed = device["tokens_per_second_at_half_rate"]
    table.add_row(f"{device['name']}: tokens a second at 50 % MFU", f"{speed:,.0f}", short(speed))
