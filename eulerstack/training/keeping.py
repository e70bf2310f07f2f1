"""What a run keeps on the disk while it trains: its last state, and on request its best stacks."""

import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ..checkpoint import read_run, save_checkpoint
from ..disk import write_whole
from ..paths import expand_home
from ..stored import check_checkpoint
from .data import TRAINED_ON
from .module import StackModule

MEASURE = "val_bits_per_byte"
LAST = Path("resume", "last.ckpt")
"""In a run's folder: the state that `--ckpt_path last` goes on from."""


class WholeFiles(TorchCheckpointIO):
    """Checkpoints of a run that are on the disk whole, or not at all.

    Lightning's own are written under the system's temporary folder and moved, which is a copy in place where that is
    another disk, and never forced out of the machine's memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("checkpoints are files of this machine: storage_options are not taken")
        try:
            write_whole(expand_home(path), lambda data: torch.save(checkpoint, data))
        except RuntimeError as error:  # torch's, in closing what could not be written
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises ValueError for a file that is damaged."""
        return read_run(expand_home(path), map_location, weights_only is not False)


class KeepBest(L.Callback):
    """best/step-N: the checkpoint directories of the `count` validations with the lowest val_bits_per_byte.

    What is kept is read from the disk, where each directory's header has its step and its bits; so a resumed run
    knows. Those of an earlier run go when a new run has kept its first. Raises ValueError for a run without validation.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"--keep_best {count} must be 1 or more")
        self.count = count
        self._started_anew = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.limit_val_batches == 0:
            raise ValueError(
                "--keep_best needs validations, and --trainer.limit_val_batches is 0; leave one of them out"
            )
        self._started_anew = trainer.ckpt_path is None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bits = float(trainer.callback_metrics.get(MEASURE, math.nan))
        if trainer.sanity_checking or trainer.fast_dev_run or math.isnan(bits):  # type: ignore[attr-defined]
            return
        root, step = Path(trainer.default_root_dir) / "best", trainer.global_step
        folder = root / f"step-{step:08d}"
        others = {other: found for other, found in kept(root).items() if other != folder}
        better = 0 if self._started_anew else sum(found <= bits for found in others.values())
        if better < self.count:
            self._keep(trainer, pl_module, folder, {"step": step, MEASURE: bits})
            self._drop(others if trainer.is_global_zero else {})
        trainer.strategy.barrier()

    def _keep(self, trainer: L.Trainer, module: L.LightningModule, folder: Path, notes: dict[str, Any]) -> None:
        assert isinstance(module, StackModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        weights = module.whole_weights()
        if trainer.is_global_zero:
            notes = {**notes, TRAINED_ON: data.trained_on}
            save_checkpoint(module.model, folder, data.text_tokenizer, notes, weights)

    def _drop(self, others: dict[Path, float]) -> None:
        """Delete what is no longer among the best, after what is has been written."""
        stay = 0 if self._started_anew else self.count - 1
        for other in sorted(others, key=others.__getitem__)[stay:]:
            shutil.rmtree(other)
        self._started_anew = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        found = {} if self._started_anew else kept(Path(trainer.default_root_dir) / "best")
        for folder in sorted(found, key=found.__getitem__):
            print(f"best: {folder}, {found[folder]:.4f} bits per byte")
        if not found:
            print(
                "best: nothing was kept, the run ended before its first validation; give --trainer.val_check_interval N"
            )


def kept(root: Path) -> dict[Path, float]:
    """The checkpoint directories in best/ with their bits per byte."""
    found = {}
    for folder in root.glob("step-*"):
        found[folder] = float(check_checkpoint(folder).get(MEASURE, math.inf))
    return found
