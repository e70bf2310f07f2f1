"""Where a training step's time goes: a trace of torch.profiler, and a table by kind of layer.

Every part's forward runs in a named range. An operation of the backward belongs to the part whose operation it is the
gradient of, which autograd numbers alike (`sequence_nr`), so that no hook changes the graph. What a checkpointed layer
computes again is in its range once more, inside the backward, and is counted there.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from ..layers.channels import ffn_flops
from ..mixers import Mixer
from ..model import Stack
from .data import Batch
from .module import StackModule

WARM, STEPS = 5, 5
"""Optimizer steps before the recorded ones, and of those."""

MARK, HEAD, VALIDATION, REST = "eulerstack::", "head and loss", "validation", "everything else"
BACKWARD = "autograd::engine::evaluate_function"


@dataclass
class Spent:
    """Seconds of a part over all recorded steps."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


class Profile(L.Callback):
    """Records STEPS optimizer steps after WARM of them, then writes trace.json and table.txt into `folder`.

    Raises ValueError for runs that are too short, and for compiled layers, which do not call their parts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._first = self._step = self._tokens = 0
        self._seconds = 0.0
        self._flops: dict[str, int] = {}
        self._profile: profile | None = None
        self._ranges: Ranges | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StackModule)
        if pl_module.compiled:
            raise ValueError(
                "--profile measures the parts of layers, which --model.compile melts; leave one of them out"
            )
        left = trainer.estimated_stepping_batches - trainer.global_step
        if left < WARM + STEPS:
            raise ValueError(f"--profile records {STEPS} steps after {WARM}, and this run has {left}")
        self._first = self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StackModule)
        if not trainer.is_global_zero:
            return
        if self._profile is not None:
            _add(self._flops, step_flops(pl_module.model, *batch.tokens.shape))
        if trainer.global_step == self._step:
            return  # the batch was accumulated
        self._step = trainer.global_step
        if self._step == self._first + WARM:
            self._start(pl_module)
        elif self._profile is not None and self._step == self._first + WARM + STEPS:
            self._write(self._profile, pl_module.device)

    def _start(self, module: StackModule) -> None:
        _wait(module.device)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if module.device.type == "cuda" else [])]
        self._ranges, self._profile = Ranges(module.model), profile(activities=kinds, acc_events=True)
        self._profile.start()
        self._seconds -= time.perf_counter()

    def _write(self, seen: profile, device: torch.device) -> None:
        assert self._ranges is not None
        _wait(device)
        self._seconds += time.perf_counter()
        seen.stop()
        self._ranges.close()
        self._profile = self._ranges = None
        self.folder.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(self.folder / "trace.json"))
        found = table(attribute(seen.events() or [], device.type == "cuda"), self._flops, self._seconds, STEPS)
        (self.folder / "table.txt").write_text(found + "\n")
        print(f"{found}\nprofile: {self.folder}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._profile is not None and self._ranges is not None:
            self._profile.stop()
            self._ranges.close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validations between the recorded steps are none of theirs."""
        if self._ranges is not None:
            _wait(pl_module.device)
            self._seconds += time.perf_counter()
            self._ranges.open(VALIDATION)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._ranges is not None:
            _wait(pl_module.device)
            self._ranges.end()
            self._seconds -= time.perf_counter()


class Ranges:
    """Named ranges around every part of a stack, until they are closed.

    Of a module that is called, by hooks; of a layer or mixer that continues a state, around the method.
    """

    def __init__(self, stack: Stack) -> None:
        self._open: list[record_function] = []
        self._wrapped: list[tuple[nn.Module, str, Any]] = []
        self._hooks = [hook for name, part in parts(stack) for hook in self._around(name, part)]
        for name, part in parts(stack):
            self._wrap(part, "chunkwise" if isinstance(part, Mixer) else "continued", name)
        for method in ("losses", "losses_from"):
            self._wrap(stack, method, HEAD)

    def _around(self, name: str, part: nn.Module) -> Iterator[Any]:
        def begin(module: nn.Module, inputs: Any) -> None:
            self.open(name)

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            self.end()

        yield part.register_forward_pre_hook(begin)
        yield part.register_forward_hook(end, always_call=True)  # a layer that is computed again stops early

    def _wrap(self, part: nn.Module, method: str, name: str) -> None:
        own, was = getattr(part, method, None), vars(part).get(method)
        if own is None:
            return

        def ranged(*args: Any, **kwargs: Any) -> Any:
            with record_function(MARK + name):
                return own(*args, **kwargs)

        setattr(part, method, ranged)
        self._wrapped.append((part, method, was))

    def open(self, name: str) -> None:
        made = record_function(MARK + name)
        made.__enter__()
        self._open.append(made)

    def end(self) -> None:
        self._open.pop().__exit__(None, None, None)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for part, method, was in self._wrapped:
            delattr(part, method)  # the class's again, or what sharding had put before it
            if was is not None:
                setattr(part, method, was)


def parts(stack: Stack) -> Iterator[tuple[str, nn.Module]]:
    """Each part that is timed, by its kind; a layer holds those behind it, and the innermost counts."""
    yield "embedding", stack.embedding
    yield "norms", stack.norm
    for block in dict.fromkeys(stack.by_index.values()):
        yield "residual stream", block
        yield block.layer.mixer_type, block.mixer
        if block.ffn is not None:
            yield f"ffn: {block.layer.ffn.type}", block.ffn
        for norm in (block.mixer_norm, block.mixer_out_norm, block.ffn_norm, block.ffn_out_norm):
            if norm is not None:
                yield "norms", norm


def step_flops(stack: Stack, rows: int, tokens: int) -> dict[str, int]:
    """FLOPs by part of a forward and backward of `rows` rows, three times the forward's."""
    found: dict[str, int] = {}
    for block in stack.by_index.values():
        own = {block.layer.mixer_type: block.mixer.flops(tokens)}
        _add(own, {} if block.ffn is None else {f"ffn: {block.layer.ffn.type}": ffn_flops(block.ffn, tokens)})
        _add(found, {name: 3 * rows * flops for name, flops in own.items()})
    rest = 3 * rows * stack.flops(tokens, training=True) - sum(found.values())
    return {**found, HEAD: rest}


def attribute(events: list[FunctionEvent], on_gpu: bool) -> dict[str, Spent]:
    """Seconds of each part: of the CPU, or of the GPU's kernels."""
    places = {id(event): _place(event) for event in events}
    numbered = {
        event.sequence_nr: places[id(event)][0]
        for event in events
        if event.sequence_nr >= 0 and places[id(event)][0] not in (None, VALIDATION) and places[id(event)][1] is None
    }
    spent: dict[str, Spent] = {}
    for event in events:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        part, backward = places[id(event)]
        name = part or (numbered.get(backward.sequence_nr) if backward is not None else _outside(event)) or REST
        one = spent.setdefault(name, Spent())
        if backward is None:
            one.forward += microseconds / 1e6
        else:
            one.backward += microseconds / 1e6
    return spent


def _place(event: FunctionEvent) -> tuple[str | None, FunctionEvent | None]:
    """The innermost part that an operation runs in, and the step of the backward that it is in, if any."""
    part = None
    for around in _upwards(event):
        if around.name == MARK + VALIDATION:
            return VALIDATION, None
        if part is None and around.name.startswith(MARK):
            part = around.name.removeprefix(MARK)
        if around.name.startswith(BACKWARD):
            return part, around
    return part, None


def _outside(event: FunctionEvent) -> str | None:
    """Which of PyTorch's own ranges around the model an operation is in: the optimizer's, or the loader's."""
    for around in _upwards(event):
        if around.name.startswith("Optimizer."):
            return "optimizer"
        if around.name.startswith("enumerate(DataLoader)"):
            return "data"
    return None


def _upwards(event: FunctionEvent) -> Iterator[FunctionEvent]:
    around: FunctionEvent | None = event
    while around is not None:
        yield around
        around = around.cpu_parent


def table(spent: dict[str, Spent], flops: dict[str, int], seconds: float, steps: int) -> str:
    """A line for each part of a step: forward and backward in ms, its share, and the FLOPs it does and does a second.

    Everything else is what no range saw: the Trainer, logging, and on a GPU the time in which it waits.
    """
    shown = {name: one for name, one in spent.items() if name not in (VALIDATION, REST)}
    shown = dict(sorted(shown.items(), key=lambda item: -item[1].total))
    shown[REST] = Spent(max(0.0, seconds - sum(one.total for one in shown.values())))
    rows: list[tuple[str, ...]] = [("part", "forward ms", "backward ms", "share", "GFLOPs", "GFLOP/s")]
    for name, one in {**shown, "a step": Spent(seconds)}.items():
        work = sum(flops.values()) if name == "a step" else flops.get(name, 0)
        times = [f"{part / steps * 1e3:.2f}" for part in (one.forward, one.backward)]
        rate = f"{work / one.total / 1e9:.1f}" if work and one.total else ""
        rows.append((name, *times, f"{one.total / seconds:.1%}", f"{work / steps / 1e9:.3f}" if work else "", rate))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for name, number in more.items():
        total[name] = total.get(name, 0) + number


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
