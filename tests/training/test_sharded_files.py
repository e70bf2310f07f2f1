"""A sharded run's directory: damaged, on a full disk, between two renames, converted, and written beside the training."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eulerstack.checkpoint import load_checkpoint, stack_of_run

pytestmark = pytest.mark.slow
Fit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fit(tmp_path: Path, corpus: Path, stack_file: Path) -> Fit:
    def run(*options: str, largest: int | None = None) -> subprocess.CompletedProcess[str]:
        words = ["--preset", str(stack_file), "--data.path", str(corpus), "--data.seq_len", "32"]
        words += ["--data.batch_size", "4", "--data.cache_dir", str(tmp_path / "cache"), "--resume_every", "2"]
        words += [
            "--trainer.accelerator",
            "cpu",
            "--trainer.strategy",
            "fsdp2",
            "--trainer.enable_progress_bar",
            "false",
        ]
        words += ["--trainer.default_root_dir", str(tmp_path / "run"), "--diagnose_every", "0"]
        return subprocess.run(
            [sys.executable, "-m", "eulerstack", "fit", *words, *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=None if largest is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest,) * 2),
            capture_output=True,
            text=True,
            timeout=900,
        )

    return run


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_no_completed_checkpoint_is_lost(fit: Fit, tmp_path: Path) -> None:
    last = tmp_path / "run" / "resume" / "last.ckpt"
    assert fit("--trainer.max_steps", "4").returncode == 0
    whole, good = bytes_of(last), tmp_path / "good.ckpt"
    shutil.copytree(last, good)

    full = fit("--trainer.max_steps", "8", "--trainer.devices", "2", "--ckpt_path", "last", largest=100_000)
    assert full.returncode != 0
    assert "last.ckpt cannot be written" in full.stderr
    assert "Traceback" not in full.stderr
    assert bytes_of(last) == whole

    shards = sorted(last.glob("*.distcp"))
    os.truncate(shards[0], 1000)
    damaged = fit("--trainer.max_steps", "8", "--ckpt_path", "last")
    assert damaged.returncode != 0
    assert "last.ckpt cannot be read, it is damaged" in damaged.stderr
    assert "Traceback" not in damaged.stderr

    shutil.rmtree(last)
    shutil.copytree(good, last.with_name(".last.ckpt.old"))  # as a kill between two renames leaves it
    assert fit("--trainer.max_steps", "8", "--ckpt_path", "last").returncode == 0


def test_what_is_written_beside_the_training_is_the_run(fit: Fit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit("--trainer.max_steps", "6", "--trainer.devices", "2", "--async_save", "true").returncode == 0
    exported, converted = load_checkpoint(run / "checkpoint"), stack_of_run(run / "resume" / "last.ckpt")
    for name, weight in exported.state_dict().items():
        assert torch.equal(weight, converted.state_dict()[name]), name
    wrong = fit("--trainer.max_steps", "8", "--ckpt_path", "last", "--trainer.strategy", "auto")
    assert "is the directory of a run that was sharded; resume it with --trainer.strategy fsdp2" in wrong.stderr
