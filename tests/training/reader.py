"""A run that writes down which rows it reads, on one or two processes: what test_shared_batches.py starts."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import eulerstack as es
from eulerstack.data.batches import Batch, Batches
from tests.training.conftest import QUIET


class Reader(L.LightningModule):
    """Trains one weight, and remembers the rows of every batch. What TextData asks of a StackModule, it has."""

    def __init__(self) -> None:
        super().__init__()
        self.spec, self.weights = es.load("every_mixer_mini"), None
        self.model = SimpleNamespace(check_length=lambda *_, **__: None)
        self.weight = nn.Parameter(torch.ones(1))
        self.read: dict[str, list[list[int]]] = {"train": [], "held_out": []}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        assert isinstance(self.trainer.train_dataloader, Batches)
        self.read["train"].append(rows_of(batch))
        return self.weight.sum()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.read["held_out"].append(rows_of(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows_of(batch: Batch) -> list[int]:
    return [hash(tuple(row)) for row in torch.cat([batch.tokens, batch.targets], 1).tolist()]


def text_data(corpus: str, out: str, **options: Any) -> es.TextData:
    return es.TextData(corpus, seed=5, seq_len=50, batch_size=4, held_out=0.3, cache_dir=f"{out}/cache", **options)


class Losses(L.Callback):
    """The loss of each batch, over all ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))


def trainer_of(devices: int, steps: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[*callbacks],
        **QUIET,
    )


def main(
    corpus: str, out: str, devices: int, steps: int, resume: str | None, stack: str | None, options: dict[str, Any]
) -> None:
    """What rank r reads, or the losses of a stack in float64, go to OUT/N.r.json, and the run to OUT/N.ckpt."""
    made = text_data(corpus, out, **options)
    if stack is not None:
        torch.set_default_dtype(torch.float64)
        L.seed_everything(1, verbose=False)
    watch, reader = Losses(), Reader()
    module = (
        reader if stack is None else es.StackModule(stack, schedule="constant", warmup_steps_ratio=0.0, lr_peak=3e-4)
    )
    trainer = trainer_of(devices, steps, *([] if stack is None else [watch]))
    trainer.fit(module, made, ckpt_path=resume)
    trainer.save_checkpoint(f"{out}/{steps}.ckpt")
    if stack is None:
        trainer.validate(module, made, verbose=False)
    found = reader.read if stack is None else watch.losses
    Path(f"{out}/{steps}.{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    corpus, out, devices, steps, resume, stack, options = sys.argv[1:]
    main(corpus, out, int(devices), int(steps), resume or None, stack or None, json.loads(options))
