"""What `eulerstack fit` adds to a training step, and the memory it takes beside its estimate, on a CPU.

`python -m benchmarks.training` measures both and prints the table of results/cpu_training.md (Linux).

A run of `fit`, with all that it does by default, stops every BLOCK steps for as many steps of a bare loop: the same
batches, optimizer, clipping and schedule, on weights of its own that began equal. So a machine that drifts drifts for
both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

import eulerstack as es
from eulerstack.memory import count_step
from eulerstack.training.data import Batch, TextData
from eulerstack.training.module import StackModule
from eulerstack.training.optim import make_optimizer, make_schedule

from .memory import _megabytes

PRESET, BATCH, TOKENS = "arch_expert_research_mini", 8, 256
BLOCK, RESULTS = 5, "EULERSTACK_BENCHMARK_RESULTS"


class Paces(L.Callback):
    """Times blocks of the run's steps and of a bare loop's, by turns, and writes them where the environment says."""

    def __init__(self) -> None:
        self.fit: list[float] = []
        self.bare: list[float] = []
        self.losses: tuple[float, float] = (0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StackModule)
        self.step = bare_steps(pl_module, trainer.max_steps)
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        if trainer.global_step % BLOCK:
            return
        self.fit.append(time.perf_counter() - self._mark)
        begun = time.perf_counter()
        for _ in range(BLOCK):
            last = self.step()
        self.bare.append(time.perf_counter() - begun)
        self.losses = (float(outputs["loss"]), last)
        self._mark = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {"fit": self.fit, "bare": self.bare, "losses": self.losses}
        Path(os.environ[RESULTS]).write_text(json.dumps(found))


def bare_steps(module: StackModule, steps: int) -> Callable[[], float]:
    """A step of the same training without a Trainer; returns its loss."""
    hints, model = module.spec.training_hints, es.build(module.spec)
    model.load_state_dict(module.model.state_dict())
    optimizer = make_optimizer(model.named_parameters(), hints)
    schedule = make_schedule(optimizer, steps, hints)
    batches = iter(_batches(hints.seed))

    def step() -> float:
        batch = next(batches)
        loss, _ = model.losses(batch.tokens, batch.targets, batch.segments())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), hints.grad_clip or float("inf"))
        optimizer.step()
        schedule.step()
        return float(loss)

    return step


def _batches(seed: int) -> Iterator[Batch]:
    data = TextData(seq_len=TOKENS, batch_size=BATCH, seed=seed)
    data.setup()
    yield from data.train_dataloader()


def overhead(steps: int) -> dict[str, Any]:
    """Seconds of blocks of `fit` and of the bare loop, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        words = ["fit", "--preset", PRESET, "--data.seq_len", str(TOKENS), "--data.batch_size", str(BATCH)]
        words += ["--trainer.max_steps", str(steps), "--trainer.default_root_dir", f"{folder}/run"]
        words += ["--trainer.callbacks+=benchmarks.training.Paces"]
        _python("-m", "eulerstack", *words, **{RESULTS: str(results)})
        found: dict[str, Any] = json.loads(results.read_text())
    return found


def peak(steps: int) -> float:
    """Bytes that a process grows by when it trains, from where all is imported and compiled to its highest."""
    done = _python("-m", "benchmarks.training", "--memory", str(steps))
    return float(done.split()[-1])


def _grown(steps: int) -> float:
    """Measured here: a run of `fit`'s parts, after a short one whose numbers are let go."""
    with tempfile.TemporaryDirectory() as folder:
        _train(2, 64, folder)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _megabytes("VmRSS")
        _train(steps, TOKENS, folder)
    return (_megabytes("VmHWM") - before) * 2**20


def _train(steps: int, tokens: int, folder: str) -> None:
    from eulerstack.cli.train import run

    words = ["--preset", PRESET, "--data.seq_len", str(tokens), "--data.batch_size", str(BATCH)]
    words += ["--trainer.max_steps", str(steps), "--resume_every", "5", "--trainer.default_root_dir", f"{folder}/run"]
    run("fit", words)


def _python(*words: str, **environment: str) -> str:
    told = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=told, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def report(found: dict[str, Any], seen: float) -> str:
    """The first block of each compiles, and is left out."""
    fit, bare = found["fit"][1:], found["bare"][1:]
    ratios = [a / b for a, b in zip(fit, bare, strict=True)]
    counted = count_step(es.load(PRESET), BATCH, TOKENS).memory().total
    rows = [
        ("steps of each", f"{len(fit) * BLOCK}"),
        ("a bare step, median", f"{statistics.median(bare) / BLOCK * 1e3:.1f} ms"),
        ("a step of fit, median", f"{statistics.median(fit) / BLOCK * 1e3:.1f} ms"),
        ("fit over bare, median of blocks", f"{statistics.median(ratios):.3f}"),
        ("fit over bare, all seconds", f"{sum(fit) / sum(bare):.3f}"),
        ("losses of the last step", " and ".join(f"{loss:.6f}" for loss in found["losses"])),
        ("memory, estimated", f"{counted / 2**20:.1f} MiB"),
        ("memory, the process's growth", f"{seen / 2**20:.1f} MiB, {seen / counted:.2f} of the estimate"),
    ]
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=105)
    parser.add_argument("--memory", type=int, help="print the bytes that training so many steps takes, and no more")
    given = parser.parse_args()
    if given.memory:
        print(_grown(given.memory))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {PRESET}, {BATCH} x {TOKENS} tokens")
    print(report(overhead(given.steps), peak(12)))


if __name__ == "__main__":
    main()
