"""A run that was stopped before a validation that was due; the schedule of a run made longer; what may not change."""

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler

import eulerstack as es
from eulerstack.training.keeping import MEASURE, KeepBest, kept

from .conftest import QUIET

pytestmark = pytest.mark.usefixtures("lightnings_own_warnings")


class Stopped(Exception):  # noqa: N818
    """The process is gone."""


class Watch(L.Callback):
    """What validations and ends of epochs saw; writes a checkpoint after a step, and stops there or in the validation."""

    def __init__(self, write: int | None = None, stop: str = "", file: Path = Path()) -> None:
        self.write, self.stop, self.file = write, stop, file
        self.seen: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.write and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.file)
            if self.stop == "step":
                raise Stopped

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.stop == "validation" and self.write is not None and trainer.global_step >= self.write:
            raise Stopped

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        bits = float(trainer.callback_metrics[MEASURE])
        self.seen.append(("validation", trainer.global_step, trainer.current_epoch, bits))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seen.append(("epoch", trainer.global_step, trainer.current_epoch))


def fit(
    stack_file: Path, corpus: Path, root: Path, resume: Path | None = None, watch: Watch | None = None, **options: Any
) -> tuple[Watch, dict[str, Any], L.Trainer]:
    """The watch, the state of EarlyStopping, and the Trainer; the weights are in its module."""
    L.seed_everything(0, verbose=False)
    watch, early = watch or Watch(), EarlyStopping(MEASURE, patience=100, min_delta=0.01)
    given = {"max_steps": 8, "check_val_every_n_epoch": None, "limit_val_batches": 2, **QUIET, **options}
    hints = given.pop("hints", {"lr_peak": 1e-2})
    callbacks = [watch, early, KeepBest(3), *given.pop("callbacks", [])]
    trainer = L.Trainer(default_root_dir=root, callbacks=callbacks, **given)
    data = es.TextData(str(corpus), seq_len=32, batch_size=8, held_out=0.2, seed=1, cache_dir=str(root / "cache"))
    module = es.StackModule(str(stack_file), kernels="torch", **hints)
    with contextlib.suppress(Stopped):
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return watch, early.state_dict(), trainer


CASES: dict[str, dict[str, Any]] = {
    "in the middle of an epoch": {"val_check_interval": 3, "write": 6},
    "at the last step": {"val_check_interval": 4, "write": 8},
    "at an epoch's end": {"check_val_every_n_epoch": 1, "max_steps": -1, "max_epochs": 2, "limit_train_batches": 3, "write": 3},
    "at the last epoch's end": {
        "check_val_every_n_epoch": 1, "max_steps": -1, "max_epochs": 2, "limit_train_batches": 3, "write": 6,
    },
    "twice in an epoch": {
        "check_val_every_n_epoch": 1, "max_epochs": 2, "limit_train_batches": 4, "val_check_interval": 2, "write": 6,
    },
    "accumulated": {"val_check_interval": 4, "accumulate_grad_batches": 2, "max_steps": 5, "write": 4},
    "at an epoch's end without one": {
        "check_val_every_n_epoch": 2, "max_steps": -1, "max_epochs": 4, "limit_train_batches": 3, "write": 3,
    },
    "before it is due": {"val_check_interval": 3, "write": 5},
}  # fmt: skip


@pytest.mark.parametrize("stop", ["step", "validation"])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_validates_first(
    stack_file: Path, corpus: Path, tmp_path: Path, name: str, stop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validations, epochs, EarlyStopping, best/ and weights are those of a run that was never stopped."""
    options = dict(CASES[name])
    write = options.pop("write")
    never, early, whole = fit(stack_file, corpus, tmp_path / "never", **options)
    file = tmp_path / "last.ckpt"
    before, _, _ = fit(stack_file, corpus, tmp_path / "run", watch=Watch(write, stop, file), **options)
    after, resumed, trainer = fit(stack_file, corpus, tmp_path / "run", resume=file, **options)
    assert len(before.seen) < len(never.seen)
    assert list(dict.fromkeys(before.seen + after.seen)) == never.seen
    assert resumed == early
    best = {folder.name: bits for folder, bits in kept(tmp_path / "never" / "best").items()}
    assert best and {folder.name: bits for folder, bits in kept(tmp_path / "run" / "best").items()} == best
    assert trainer.global_step == whole.global_step
    assert all(map(torch.equal, trainer.lightning_module.parameters(), whole.lightning_module.parameters()))


def test_one_that_was_held_is_not_held_again(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    """Resumed again and again, from what is written after the validation too."""

    class Write(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    options: dict[str, Any] = {"val_check_interval": 2}
    never, _, _ = fit(stack_file, corpus, tmp_path / "never", **options)
    fit(stack_file, corpus, tmp_path / "run", watch=Watch(2, "step", tmp_path / "last.ckpt"), **options)
    again, _, _ = fit(
        stack_file, corpus, tmp_path / "run", resume=tmp_path / "last.ckpt", callbacks=[Write()], **options
    )
    assert again.seen == never.seen
    last, _, _ = fit(stack_file, corpus, tmp_path / "run", resume=tmp_path / "2.ckpt", **options)
    assert last.seen == never.seen[1:]


def test_a_run_made_longer_has_its_schedule_from_the_first_step_on(
    stack_file: Path, corpus: Path, tmp_path: Path
) -> None:
    class Rates(L.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

    whole, first, rest = Rates(), Rates(), Rates()
    fit(stack_file, corpus, tmp_path / "whole", callbacks=[whole], max_steps=9)
    *_, trainer = fit(stack_file, corpus, tmp_path / "run", callbacks=[first], max_steps=4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(stack_file, corpus, tmp_path / "run", resume=tmp_path / "last.ckpt", callbacks=[rest], max_steps=9)
    assert first.seen != whole.seen[:4]
    assert rest.seen == whole.seen[4:]


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ({"accumulate_grad_batches": 2}, {}, r"trainer\.accumulate_grad_batches = 2 \(now 1\); resume with the same"),
        ({}, {"precision": "bf16-mixed"}, r"trainer\.precision = 32-true \(now bf16-mixed\)"),
        ({}, {"gradient_clip_val": 0.5}, r"trainer\.gradient_clip_val = None \(now 0\.5\)"),
        ({"gradient_clip_val": 1.0}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "= norm .now value"),
        ({}, {"limit_train_batches": 3}, r"trainer\.limit_train_batches = 1\.0 \(now 3\)"),
        ({}, {"callbacks": [GradientAccumulationScheduler({0: 2})]}, r"accumulate_grad_batches = 1 \(now \{0: 2\}\)"),
    ],
)  # fmt: skip
def test_what_a_resumed_run_may_not_change(
    stack_file: Path, corpus: Path, tmp_path: Path, first: dict[str, Any], then: dict[str, Any], said: str
) -> None:
    *_, trainer = fit(stack_file, corpus, tmp_path, max_steps=1, **first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=said):
        fit(stack_file, corpus, tmp_path, resume=tmp_path / "last.ckpt", max_steps=2, **then)


def test_a_scheduler_of_accumulation_acts_in_the_middle_of_an_epoch(
    stack_file: Path, corpus: Path, tmp_path: Path
) -> None:
    """Lightning sets what it says at the beginning of an epoch alone."""
    options: dict[str, Any] = {"max_steps": 6, "val_check_interval": 1000, "hints": {"schedule": "constant"}}
    *_, whole = fit(stack_file, corpus, tmp_path, callbacks=[GradientAccumulationScheduler({0: 2})], **options)
    watch = Watch(3, "step", tmp_path / "last.ckpt")
    fit(stack_file, corpus, tmp_path, watch=watch, callbacks=[GradientAccumulationScheduler({0: 2})], **options)
    scheduled = [GradientAccumulationScheduler({0: 2})]
    *_, trainer = fit(stack_file, corpus, tmp_path, resume=tmp_path / "last.ckpt", callbacks=scheduled, **options)
    assert all(map(torch.equal, trainer.lightning_module.parameters(), whole.lightning_module.parameters()))
