"""What a run keeps: whole files only, the best stacks, and sentences for what cannot be resumed."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors import SafetensorError

import eulerstack as es
from eulerstack.cli.train import run
from eulerstack.spec import differ
from eulerstack.training.keeping import KeepBest, WholeFiles, kept

from .conftest import QUIET

pytestmark = pytest.mark.usefixtures("lightnings_own_warnings")


@pytest.fixture
def trainer(stack_file: Path, corpus: Path, tmp_path: Path) -> Callable[..., L.Trainer]:
    """Trains `steps` steps; module options and Trainer options by name."""

    def fit(steps: int, resume: Path | None = None, changes: tuple[str, ...] = (), **options: Any) -> L.Trainer:
        L.seed_everything(0, verbose=False)
        made = L.Trainer(
            max_steps=steps, default_root_dir=tmp_path / "run", plugins=[WholeFiles()], **{**QUIET, **options}
        )
        data = es.TextData(str(corpus), seq_len=32, batch_size=4, cache_dir=str(tmp_path / "cache"))
        module = es.StackModule(str(stack_file), schedule="constant", settings=list(changes))
        made.fit(module, data, ckpt_path=resume, weights_only=True)
        return made

    return fit


class FullDisk:
    """A file on a disk that fills after `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))

    def flush(self) -> None:
        self.file.flush()


def test_a_disk_that_fills_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, disk = tmp_path / "resume" / "last.ckpt", WholeFiles()
    disk.save_checkpoint({"step": 1, "weights": torch.ones(9000)}, last)
    save = torch.save
    for room in (0, 100, 20_000):
        monkeypatch.setattr(torch, "save", lambda found, data, room=room: save(found, FullDisk(data, room)))
        with pytest.raises(OSError, match="No space left"):
            disk.save_checkpoint({"step": 2, "weights": torch.zeros(9000)}, last)
        assert [file.name for file in last.parent.iterdir()] == ["last.ckpt"]
        assert disk.load_checkpoint(last)["step"] == 1
    monkeypatch.undo()
    disk.save_checkpoint({"step": 2}, last)
    assert disk.load_checkpoint(last) == {"step": 2}


def test_a_kill_between_bytes_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process that dies leaves is beside the file, by a name that no one reads, and the next write's place."""
    last, disk = tmp_path / "last.ckpt", WholeFiles()
    disk.save_checkpoint({"step": 1}, last)
    (tmp_path / ".last.ckpt.part").write_bytes(b"half")
    assert disk.load_checkpoint(last) == {"step": 1}
    disk.save_checkpoint({"step": 2}, last)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_directory_that_cannot_be_written_leaves_the_old_one(
    stack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = es.build(es.load(stack_file)), tmp_path / "checkpoint"
    es.save_checkpoint(model, folder)
    before, replace = (folder / "model.safetensors").read_bytes(), os.replace

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def only_back(source: Path, target: Path) -> None:
        if target == folder and source.name != ".checkpoint.old":
            full()
        replace(source, target)

    def full_as_safetensors_says_it(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    saved = ("checkpoint.save_file", full_as_safetensors_says_it)
    for name, broken in (saved, ("disk.to_disk", full), ("disk.os.replace", only_back)):
        monkeypatch.setattr(f"eulerstack.{name}", broken)
        with pytest.raises(OSError, match="No space left"):
            es.save_checkpoint(es.build(es.load(stack_file)), folder)
        monkeypatch.undo()
        assert (folder / "model.safetensors").read_bytes() == before
        assert [f.name for f in tmp_path.iterdir() if "checkpoint" in f.name] == ["checkpoint"]


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_damaged_run_is_a_sentence(size: int, stack_file: Path, tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"weights": torch.ones(9000)}, last)
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read.*resume from another"):
        WholeFiles().load_checkpoint(last)


def test_resuming_says_what_differs(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    trainer(1, limit_val_batches=0).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"another stack.*: model\.mlp_ratio was 1\.0 and is 3\.0; resume with"):
        trainer(2, tmp_path / "last.ckpt", ("model.mlp_ratio=3",), limit_val_batches=0)
    with pytest.raises(ValueError, match=r"another recipe.*: training_hints\.lr_peak was .* and is 0\.5; resume"):
        trainer(2, tmp_path / "last.ckpt", ("training_hints.lr_peak=0.5",), limit_val_batches=0)


def test_differences_of_specs_are_named() -> None:
    spec = es.load("arch_expert_research_mini")
    other = es.load("arch_expert_research_mini", ["model.n_kv_heads=1", "layer_schedule.0.repeat=3"])
    assert differ(spec, spec) == ""
    assert "model.n_kv_heads was" in differ(spec, other)
    assert "layer_schedule.0.repeat was" in differ(spec, other)
    assert "more keys differ" in differ(spec, es.load("every_mixer_mini"))


def test_the_best_are_kept(trainer: Callable[..., L.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, wanted = tmp_path / "run" / "best", iter([3.0, 1.0, 2.0, 4.0, float("nan"), 0.5, 9.0])
    begun = es.StackModule.on_validation_epoch_end

    def measured(self: es.StackModule) -> None:
        begun(self)
        self.log("val_bits_per_byte", next(wanted))

    monkeypatch.setattr(es.StackModule, "validation_step", lambda *_: None)
    monkeypatch.setattr(es.StackModule, "on_validation_epoch_end", measured)
    options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    last = trainer(4, callbacks=[KeepBest(2)], **options)
    assert {folder.name: bits for folder, bits in kept(root).items()} == {"step-00000002": 1.0, "step-00000003": 2.0}
    assert json.loads((root / "step-00000002" / "eulerstack.json").read_text())["step"] == 2
    es.load_checkpoint(root / "step-00000002")
    last.save_checkpoint(tmp_path / "last.ckpt")
    trainer(6, tmp_path / "last.ckpt", callbacks=[KeepBest(2)], **options)  # goes on: not a number, then 0.5
    assert sorted(folder.name for folder in kept(root)) == ["step-00000002", "step-00000006"]
    trainer(1, callbacks=[KeepBest(2)], **options)  # a new run's first, though it is worse
    assert [folder.name for folder in root.iterdir()] == ["step-00000001"]


def test_nothing_to_keep_is_said(trainer: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="limit_val_batches is 0"):
        trainer(1, callbacks=[KeepBest(2)], limit_val_batches=0)
    with pytest.raises(ValueError, match="--keep_best 0 must be 1 or more"):
        KeepBest(0)
    trainer(1, callbacks=[KeepBest(2)])
    assert "before its first validation" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # those of Lightning's command line
def test_fit_keeps_the_best_and_says_its_speed(
    stack_file: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["eulerstack"])
    root = tmp_path / "run"
    words = ["--preset", str(stack_file), "--data.path", str(corpus), "--data.seq_len", "32", "--data.batch_size", "4"]
    words += ["--trainer.max_steps", "6", "--trainer.default_root_dir", str(root), "--trainer.log_every_n_steps", "2"]
    words += ["--trainer.val_check_interval", "2", "--trainer.check_val_every_n_epoch", "null", "--keep_best", "2"]
    words += ["--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", "--peak_flops", "1e12"]
    run("fit", words)
    assert len(kept(root / "best")) == 2
    assert capsys.readouterr().out.count("best: ") == 2
    head = (root / "logs" / "version_0" / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"tokens_per_second", "mfu", "peak_memory_gib"} <= set(head)
    assert [file.name for file in (root / "resume").iterdir()] == ["last.ckpt"]
    with pytest.raises(ValueError, match=r"another stack.*model\.mlp_ratio was 1\.0 and is 3\.0"):
        run("fit", [*words, "--set", "model.mlp_ratio=3", "--ckpt_path", "last"])
    last = root / "resume" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:9000])
    for path in ("last", str(last)):
        with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
            run("fit", [*words, "--ckpt_path", path])
