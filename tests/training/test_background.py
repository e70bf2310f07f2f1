"""Checkpoints that a thread writes: those of the step they are of, whole, and with their errors heard."""

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import eulerstack as es
from eulerstack.training.background import InBackground
from eulerstack.training.keeping import WholeFiles

from ..conftest import PATIENCE
from .conftest import QUIET


class Slow:
    """torch.save, once it is let go; `full` in place of the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.save, self.full = threading.Event(), threading.Semaphore(0), torch.save, False
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, found: Any, data: Any) -> None:
        self.begun.release()
        assert self.go.wait(PATIENCE)
        if self.full:
            data.write(b"half of")
            raise OSError(errno.ENOSPC, "No space left on device")
        self.save(found, data)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow(monkeypatch)
    yield made
    made.go.set()


def test_a_file_is_of_the_step_it_was_asked_for(slow: Slow, tmp_path: Path) -> None:
    disk, last = InBackground(), tmp_path / "last.ckpt"
    weights, counts = torch.ones(9), [1]
    disk.save_checkpoint({"weights": {"w": weights}, "counts": counts}, last)
    weights.add_(1)  # the next step, while the thread has not begun
    counts.append(2)
    assert not last.exists()
    slow.go.set()
    found = disk.load_checkpoint(last)
    assert found["weights"]["w"].tolist() == [1.0] * 9 and found["counts"] == [1]
    disk.teardown()


def test_one_is_written_at_a_time_and_the_last_is_waited_for(slow: Slow, tmp_path: Path) -> None:
    disk, last = InBackground(), tmp_path / "last.ckpt"
    disk.save_checkpoint({"step": 1}, last)
    second = threading.Thread(target=lambda: disk.save_checkpoint({"step": 2}, last))
    second.start()
    assert slow.begun.acquire(timeout=PATIENCE)  # the first is being written
    second.join(0.2)
    assert second.is_alive() and not slow.begun.acquire(blocking=False)
    slow.go.set()
    second.join(PATIENCE)
    disk.teardown()
    assert WholeFiles().load_checkpoint(last) == {"step": 2}


@pytest.mark.parametrize("heard", ["save_checkpoint", "load_checkpoint", "teardown"])
def test_what_goes_wrong_is_heard_and_the_file_before_it_stays(heard: str, slow: Slow, tmp_path: Path) -> None:
    disk, last = InBackground(), tmp_path / "last.ckpt"
    slow.go.set()
    disk.save_checkpoint({"step": 1}, last)
    disk.wait()
    slow.full = True
    disk.save_checkpoint({"step": 2}, last)
    words: dict[str, tuple[Any, ...]] = {"save_checkpoint": ({}, last), "load_checkpoint": (last,), "teardown": ()}
    with pytest.raises(OSError, match="No space left"):
        getattr(disk, heard)(*words[heard])
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert WholeFiles().load_checkpoint(last) == {"step": 1}
    disk.teardown()


@pytest.fixture
def fit(stack_file: Path, corpus: Path, tmp_path: Path) -> Callable[[WholeFiles, str], Path]:
    """Six steps with a checkpoint after each; the file of the fifth."""

    def run(disk: WholeFiles, name: str) -> Path:
        L.seed_everything(0, verbose=False)
        each = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)
        options = {**QUIET, "enable_checkpointing": True, "callbacks": [each], "default_root_dir": tmp_path}
        trainer = L.Trainer(max_steps=6, limit_val_batches=0, plugins=[disk], **options)
        data = es.TextData(str(corpus), seq_len=32, batch_size=4, cache_dir=str(tmp_path / "cache"))
        trainer.fit(es.StackModule(str(stack_file), optimizer="hybrid"), data)
        return tmp_path / name / "step=5.ckpt"

    return run


@pytest.mark.usefixtures("lightnings_own_warnings")
def test_a_run_keeps_the_same_with_and_without(fit: Callable[[WholeFiles, str], Path]) -> None:
    plain, behind = (
        WholeFiles().load_checkpoint(fit(disk, type(disk).__name__)) for disk in (WholeFiles(), InBackground())
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert _flat(plain[part]) == _flat(behind[part])


@pytest.mark.usefixtures("lightnings_own_warnings")
def test_a_full_disk_ends_the_run(fit: Callable[[WholeFiles, str], Path], slow: Slow) -> None:
    slow.full = True
    slow.go.set()
    with pytest.raises(OSError, match="No space left"):
        fit(InBackground(), "full")


def _flat(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return found.tolist()
    if isinstance(found, dict):
        return {key: _flat(value) for key, value in found.items()}
    return [_flat(value) for value in found] if isinstance(found, list | tuple) else found
