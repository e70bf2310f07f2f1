"""What a run leaves behind: a checkpoint to generate from, and a picture of the loss."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import lightning as L

from ..checkpoint import save_checkpoint
from ..tokens import tokenizer_of
from .module import StackModule


class Export(L.Callback):
    """When a run ends, write its checkpoint directory and its loss curve into the run's folder."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StackModule)
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        spec = pl_module.spec
        save_checkpoint(pl_module.model, root / "checkpoint", tokenizer_of(spec.tokenizer_contract, pl_module.weights))
        print(f"checkpoint: {root / 'checkpoint'}")
        self._draw(root)

    def _draw(self, root: Path) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            print("loss curve: not drawn, matplotlib is not installed (pip install 'eulerstack[plot]')")
            return
        picture = draw_loss(root)
        if picture is not None:
            print(f"loss curve: {picture}")


def draw_loss(root: Path) -> Path | None:
    """loss.png from the CSV logs of a run and of the runs it resumed; None where nothing was logged."""
    curves = {name: _curve(root, name) for name in ("bits_per_byte", "val_bits_per_byte")}
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


def _curve(root: Path, name: str) -> dict[int, float]:
    """step -> value; what a resumed run logged again replaces what was there."""
    points: dict[int, float] = {}
    for file in sorted(root.glob("logs/version_*/metrics.csv"), key=lambda f: int(f.parent.name.partition("_")[2])):
        with file.open(newline="") as rows:
            points |= {int(row["step"]): float(row[name]) for row in csv.DictReader(rows) if row.get(name)}
    return points
