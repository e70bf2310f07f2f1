"""Runs that are killed at random moments, again and again, end as those that were not: losses and weights to the bit."""

import multiprocessing
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import eulerstack as es
from eulerstack.training.callbacks import _curve

STEPS = 40
SERVER: Any = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["eulerstack.training.cli", __name__])  # a child begins with all modules loaded


def train(words: list[str], folder: Path, kill_at: float | None) -> None:
    """`eulerstack fit` in a process of its own, killed within a few ms of batch number `kill_at` of this process."""
    from eulerstack.cli.train import run

    os.chdir(folder)
    sys.argv = ["eulerstack"]
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    if kill_at is not None:
        _kill_near(kill_at)
    run("fit", words)


def _kill_near(moment: float) -> None:
    begun, seen = es.StackModule.on_train_batch_start, [0]

    def counting(self: es.StackModule, *given: Any) -> None:
        if seen[0] == int(moment):
            threading.Timer(moment % 1 * 0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()
        seen[0] += 1
        begun(self, *given)

    es.StackModule.on_train_batch_start = counting  # type: ignore[method-assign]


def started(words: list[str], folder: Path, kill_at: float | None = None) -> int:
    process = SERVER.Process(target=train, args=(words, folder, kill_at))
    process.start()
    process.join()
    return int(process.exitcode)


def words_for(stack: Path, root: str, more: list[str]) -> list[str]:
    given = f"--preset {stack} --data.seq_len 32 --data.batch_size 4 --data.held_out 0.2 --data.cache_dir cache"
    run = f"--trainer.max_steps {STEPS} --trainer.max_epochs -1 --trainer.limit_val_batches 0 --resume_every 3"
    quiet = "--trainer.enable_progress_bar false --trainer.log_every_n_steps 1 --model.kernels torch"
    return [
        *given.split(),
        *run.split(),
        *quiet.split(),
        "--model.dropout=0.1",
        "--trainer.default_root_dir",
        root,
        *more,
    ]


def losses(root: Path) -> dict[int, float]:
    return _curve(sorted((root / "logs").iterdir()), "loss")


def weights(root: Path) -> bytes:
    return (root / "checkpoint" / "model.safetensors").read_bytes()


def check_killed(stack: Path, folder: Path, more: list[str], kills: int, seed: int) -> None:
    """Each kill comes 2 to 12 batches after the process began, so that all come before the run's end."""
    assert started(words_for(stack, "straight", more), folder) == 0
    words, draw = words_for(stack, "killed", more), random.Random(seed)
    for kill in range(kills + 1):
        resume = ["--ckpt_path", "last"] if (folder / "killed" / "resume" / "last.ckpt").is_file() else []
        last = kill == kills
        code = started([*words, *resume], folder, None if last else draw.uniform(2, 12))
        assert code == (0 if last else -signal.SIGKILL)
    assert resume, "no kill came after the first resume point"
    straight, killed = losses(folder / "straight"), losses(folder / "killed")
    assert len(straight) == STEPS
    assert len(killed) > STEPS // 2
    assert all(straight[step] == loss for step, loss in killed.items())
    assert weights(folder / "killed") == weights(folder / "straight")


CASES = [
    (reading, packing, workers, 2 + (at % 2))
    for at, (reading, packing, workers) in enumerate(
        (r, p, w) for r in ("map", "stream") for p in ("cut", "packed") for w in (0, 2)
    )
]
"""20 kills in all."""


@pytest.mark.slow
@pytest.mark.parametrize(("reading", "packing", "workers", "kills"), CASES)
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    stack_file: Path, corpus: Path, tmp_path: Path, reading: str, packing: str, workers: int, kills: int
) -> None:
    path = str(corpus)
    if reading == "stream":
        pytest.importorskip("litdata")
        made = es.TextData(path, seq_len=32, held_out=0.2, packing=packing, cache_dir=str(tmp_path / "cache"))
        made.write_stream(tmp_path / "rows")
        path = f"local:{tmp_path / 'rows'}"
    more = ["--data.path", path, "--data.packing", packing, "--data.workers", str(workers)]
    check_killed(stack_file, tmp_path, more, kills, seed=kills + workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_carried_state_outlives_kills(stack_file: Path, corpus: Path, tmp_path: Path, workers: int) -> None:
    more = ["--data.path", str(corpus), "--data.carry_state", "true", "--data.workers", str(workers)]
    check_killed(stack_file, tmp_path, more, 2, seed=workers)


@pytest.mark.slow
def test_a_mixture_outlives_kills(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    sources = f"[{{path: {corpus}, weight: 2, pattern: '0*.txt'}}, {{path: {corpus}, weight: 1, pattern: '1*.txt'}}]"
    check_killed(stack_file, tmp_path, ["--data.sources", sources], 2, seed=3)
