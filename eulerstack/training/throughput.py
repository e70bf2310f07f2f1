"""How fast a run is: tokens a second, the share of the device's rate, and the memory's peak."""

import sys
import time
from collections import deque
from typing import Any

import lightning as L
import torch

from ..devices import recognise
from .data import Batch
from .module import StackModule

WINDOW = 10
"""Steps over which speed is measured: a GPU works behind Python, by less than these."""


class Throughput(L.Callback):
    """Logs tokens_per_second, mfu (model FLOPs utilisation) and peak_memory_gib after every optimizer step.

    A step's time is that of all its accumulated batches; validations, and what the first step compiles, do not count.
    mfu: FLOPs of the model (three times the forward's, none for layers computed again, attention over whole rows) a
    second, divided by `peak_flops`: by default the data sheet's dense 16-bit rate of a GPU in `devices.py`. Where no
    peak is known there is no mfu. Memory is what PyTorch allocated on a GPU, the process's resident set on a CPU.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"--peak_flops {peak_flops} must be above 0: FLOPs a second, as in 989e12")
        self.peak_flops = peak_flops
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)  # seconds, tokens, FLOPs
        self._step = 0  # optimizer steps when the last one ended
        self._clear(None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            if self.peak_flops is None:
                known = recognise(torch.cuda.get_device_name(device))
                self.peak_flops = None if known is None else known.flops
        self._steps.clear()
        self._clear(None)
        self._step = trainer.global_step

    def _clear(self, mark: float | None) -> None:
        """Begin a step. mark: when the clock began to run; None before the first step has ended."""
        self._mark, self._seconds, self._tokens, self._flops = mark, 0.0, 0, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StackModule)
        rows, tokens = batch.tokens.shape
        rows *= pl_module.ranks.of
        self._tokens += rows * tokens
        self._flops += 3 * rows * pl_module.flops(tokens)
        if trainer.global_step == self._step:
            return  # the batch was accumulated
        self._step, now = trainer.global_step, time.perf_counter()
        if self._mark is not None:
            self._steps.append((self._seconds + now - self._mark, self._tokens, self._flops))
        self._clear(now)
        for name, value in self.figures(pl_module.device, trainer.world_size).items():
            pl_module.log(name, value, prog_bar=True, batch_size=rows)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._mark is not None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self._seconds += time.perf_counter() - self._mark

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._mark is not None:
            self._mark = time.perf_counter()

    def figures(self, device: torch.device, devices: int = 1) -> dict[str, float]:
        """What the last steps took: tokens_per_second, mfu where the peak is known, peak_memory_gib."""
        found = {}
        if self._steps:
            seconds, tokens, flops = map(sum, zip(*self._steps, strict=True))
            found["tokens_per_second"] = tokens / seconds
            if self.peak_flops is not None:
                found["mfu"] = flops / seconds / self.peak_flops / devices
        peak = peak_memory(device)
        return found if peak is None else {**found, "peak_memory_gib": peak / 2**30}


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak so far: of PyTorch's tensors on a GPU, of the whole process on a CPU; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415 - Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
