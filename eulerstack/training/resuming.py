"""What a run that resumes must share with the one that was stopped, and what it does first.

Lightning writes its checkpoints before the validation that follows a step, and before the end of an epoch, and when it
resumes takes both for done. Here the checkpoint says what is left to do, and the resumed run begins with it.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

KEY = "left_to_do"
VALIDATION, EPOCH_END = "validation", "epoch_end"


def options_of(trainer: L.Trainer) -> dict[str, Any]:
    """The Trainer's options that change what a run computes, as plain values."""
    algorithm = trainer.gradient_clip_algorithm
    steps = [c.scheduling for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    return {
        "accumulate_grad_batches": steps[0] if steps else trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": "norm" if algorithm is None else str(algorithm.value),
        "limit_train_batches": trainer.limit_train_batches,
    }


def check_options(was: dict[str, Any], trainer: L.Trainer) -> None:
    """Raises ValueError where the run to resume had other options of the Trainer."""
    now = options_of(trainer)
    changed = [f"trainer.{key} = {value} (now {now[key]})" for key, value in was.items() if now[key] != value]
    if changed:
        raise ValueError(
            f"the run to resume had {', '.join(changed)}; resume with the same, or start a new run from its checkpoint/"
        )


def left_to_do(trainer: L.Trainer) -> str | None:
    """What follows the batch that has just been trained on, and has not begun: a validation, the end of its epoch.

    A validation that only follows because the run ends early (`should_stop`) does not count: a resumed run goes on.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    batches: Any = loop.batch_progress.total
    if fetcher is None or batches.processed != batches.completed + 1:
        return None
    stops, trainer.should_stop = trainer.should_stop, False
    try:
        due = loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stops
    return VALIDATION if due else EPOCH_END if loop._num_ready_batches_reached() else None


class Beginning:
    """What a resumed run begins with, if the one that was stopped left it to do."""

    def __init__(self) -> None:
        self._max_steps: int | None = None  # the Trainer's, where the validation follows the last step
        self._validates = self._ends_epoch = False

    def begin(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """Change what Lightning loads into its loops: they shall go on behind the batch, not with the next one."""
        left, loops = checkpoint.get(KEY), checkpoint["loops"]["fit_loop"]
        if left is None or (left == VALIDATION and trainer.limit_val_batches == 0):
            return
        for counts in (loops["epoch_loop.batch_progress"][side] for side in ("total", "current")):
            counts["completed"] = counts["processed"]
        if left == EPOCH_END:
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
            trainer.fit_loop.epoch_loop.val_loop._has_run = self._ends_epoch = True
            return
        self._validates, name = True, "epoch_loop.val_loop.batch_progress"
        done = loops[name]["total"]["completed"]
        begun = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
        loops[name] = {"total": begun, "current": dict.fromkeys(begun, 0), "is_last_batch": False}
        loop = trainer.fit_loop.epoch_loop
        if 0 < loop.max_steps <= checkpoint["global_step"]:  # at its last step Lightning does not even begin
            self._max_steps, loop.max_steps = loop.max_steps, checkpoint["global_step"] + 1

    def epoch_ended(self, trainer: L.Trainer) -> None:
        """Lightning's loop over batches, which had none to train on, would take the next epoch for resumed as well."""
        if self._ends_epoch:
            trainer.fit_loop.epoch_loop.on_iteration_done()
            self._ends_epoch = False

    def started(self, trainer: L.Trainer) -> None:
        """Put back what `begin` changed, when the validation has begun."""
        loop = trainer.fit_loop.epoch_loop
        if self._validates and not trainer.sanity_checking:
            loop.max_steps, self._max_steps = self.max_steps(trainer), None
            loop.val_loop.batch_progress.total.reset_on_restart()
            self._validates = False

    def max_steps(self, trainer: L.Trainer) -> int:
        """Those that the Trainer was given."""
        return trainer.max_steps if self._max_steps is None else self._max_steps
