"""What a run leaves behind: a checkpoint to generate from, and a picture of the loss."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import lightning as L

from ..checkpoint import save_checkpoint
from ..stored import check_checkpoint
from .data import TRAINED_ON
from .keeping import LAST
from .module import StackModule


class Export(L.Callback):
    """When a run ends, write its checkpoint directory and its loss curve into the run's folder.

    Remembers, across resumptions, the log folders of the run.
    """

    def __init__(self) -> None:
        self.logs: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"logs": self.logs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.logs = state_dict["logs"] + self.logs

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse now, not after the training, to write over a folder that is no checkpoint."""
        folder = Path(trainer.default_root_dir) / "checkpoint"
        if folder.exists():
            check_checkpoint(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.log_dir and trainer.log_dir not in self.logs:
            self.logs.append(trainer.log_dir)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.checkpoint_callback is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(trainer.default_root_dir) / LAST)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StackModule)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        weights = pl_module.whole_weights()
        if not trainer.is_global_zero:
            return
        root, data = Path(trainer.default_root_dir), trainer.datamodule  # type: ignore[attr-defined]
        notes = {TRAINED_ON: data.trained_on}
        save_checkpoint(pl_module.model, root / "checkpoint", data.text_tokenizer, notes, weights)
        print(f"checkpoint: {root / 'checkpoint'}")
        self._draw(root)

    def _draw(self, root: Path) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            print("loss curve: not drawn, matplotlib is not installed (pip install 'eulerstack[plot]')")
            return
        picture = draw_loss(root, [Path(folder) for folder in self.logs])
        print(f"loss curve: {picture or 'not drawn, the run has logged nothing as CSV yet'}")


def draw_loss(root: Path, logs: list[Path]) -> Path | None:
    """loss.png from the CSV logs of a run, one folder for each time it was resumed; None where nothing was logged."""
    curves = {name: _curve(logs, name) for name in ("bits_per_byte", "val_bits_per_byte")}
    if not any(curves.values()):
        return None
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    looks: dict[str, Any] = {"bits_per_byte": {"lw": 1, "label": "training"}}
    looks["val_bits_per_byte"] = {"marker": "o", "lw": 2, "label": "held out"}
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*sorted(points.items()), strict=True), **looks[name])
    axes.set(xlabel="step", ylabel="bits per byte", title=root.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(root / "loss.png", dpi=120)
    return root / "loss.png"


def _curve(logs: list[Path], name: str) -> dict[int, float]:
    """step -> value; what a resumed run logged again replaces what was there."""
    points: dict[int, float] = {}
    for file in (folder / "metrics.csv" for folder in logs):
        if not file.is_file():
            continue
        with file.open(newline="") as rows:
            points |= {int(row["step"]): float(row[name]) for row in csv.DictReader(rows) if row.get(name)}
    return points
