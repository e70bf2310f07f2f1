"""StackModule: a stack as a plain LightningModule."""

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from ..checkpoint import check_checkpoint, load_weights
from ..model import IGNORED, Stack, build
from ..spec import StackSpec, dump, load, loads
from .data import Batch, TextData
from .optim import adamw, warmup_cosine


class StackModule(L.LightningModule):
    """Trains a stack on batches of `Batch`.

    Args:
        spec: a YAML file, a preset's name, a StackSpec, or a checkpoint directory, whose weights are loaded.
        lr_peak: learning rate after warm-up. This and the next five are the spec's training_hints unless given.
        lr_floor_ratio: the last learning rate, as a share of lr_peak.
        betas: AdamW's.
        weight_decay: AdamW's, on matrices and embeddings only.
        grad_clip: largest gradient norm; 0 for none. The Trainer's gradient_clip_val wins.
        warmup_steps_ratio: share of the steps that warm up.
        kernels: provider of the mixers' kernels.
    """

    def __init__(
        self,
        spec: str | Path | StackSpec,
        lr_peak: float | None = None,
        lr_floor_ratio: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        grad_clip: float | None = None,
        warmup_steps_ratio: float | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.spec, self.weights = _spec_and_weights(spec)
        hints = self.spec.training_hints
        self.lr_peak = _given(lr_peak, hints.lr_peak)
        self.lr_floor_ratio = _given(lr_floor_ratio, hints.lr_floor_ratio)
        self.betas = betas or hints.betas
        self.weight_decay = _given(weight_decay, hints.weight_decay)
        self.grad_clip = _given(grad_clip, hints.grad_clip or 0.0)
        self.warmup_steps_ratio = _given(warmup_steps_ratio, hints.warmup_steps_ratio)
        self.kernels = kernels
        self._built: Stack | None = None
        self._clock: float | None = None
        self._held_out = (0.0, 0)

    @property
    def model(self) -> Stack:
        """The stack; built on first use, in the dtype that Lightning's precision asks for."""
        self.configure_model()
        assert self._built is not None
        return self._built

    def configure_model(self) -> None:
        if self._built is not None:
            return
        self._built = build(self.spec, "cpu", torch.get_default_dtype(), self.kernels)
        if self.weights is not None:
            load_weights(self._built, self.weights)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss, parts = self.model.losses(batch.tokens, batch.targets, batch.segments())
        bits = parts["cross_entropy"].detach() / math.log(2) / batch.bytes_per_token
        rows = batch.tokens.shape[0]
        self.log("loss", loss.detach(), prog_bar=True, batch_size=rows)
        self.log("bits_per_byte", bits, prog_bar=True, batch_size=rows)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        now = time.perf_counter()
        if self._clock is not None:
            speed = batch.tokens.numel() / (now - self._clock)
            self.log("tokens_per_second", speed, prog_bar=True, batch_size=batch.tokens.shape[0])
        self._clock = now

    def on_validation_end(self) -> None:
        self._clock = None  # a step's time does not hold the validation

    def validation_step(self, batch: Batch, index: int) -> None:
        self._measure("val_bits_per_byte", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self._measure("held_out_bits_per_byte", batch)

    def _measure(self, name: str, batch: Batch) -> None:
        """Log the mean over predicted tokens, weighted by how many each batch has."""
        _, parts = self.model.losses(batch.tokens, batch.targets, batch.segments())
        bits = parts["cross_entropy"] / math.log(2) / batch.bytes_per_token
        count = int((batch.targets != IGNORED).sum())
        self.log(name, bits, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = adamw(self.model.named_parameters(), self.lr_peak, self.betas, self.weight_decay)
        schedule = warmup_cosine(optimizer, self._steps(), self.warmup_steps_ratio, self.lr_floor_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        chosen = self.grad_clip or None if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, chosen, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stack"] = dump(self.spec)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the run's spec is another one."""
        if loads(checkpoint["stack"]) != self.spec:
            raise ValueError(
                "the run to resume trained another stack than this spec; "
                "resume with the YAML file it started from, or start a new run"
            )

    def _steps(self) -> int:
        """Optimizer steps of the whole run: the length of the schedule."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        data: object = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TextData) and self.trainer.max_epochs and self.trainer.max_epochs > 0:
            batches = len(data.train_dataloader())
            return self.trainer.max_epochs * math.ceil(batches / self.trainer.accumulate_grad_batches)
        raise ValueError("the learning rate's schedule needs the run's length: give trainer.max_steps")


def _spec_and_weights(spec: str | Path | StackSpec) -> tuple[StackSpec, Path | None]:
    if isinstance(spec, StackSpec):
        return spec, None
    if Path(spec).is_dir():
        check_checkpoint(Path(spec))
        return load(spec), Path(spec)
    return load(spec), None


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
