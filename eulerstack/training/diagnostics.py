"""What training does to the mixers: decays, steps and the size of states, layer by layer, in the run's log."""

from collections.abc import Iterator
from itertools import count
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from ..block import SPAN
from ..mixers import Mixer
from ..model import Stack
from ..segments import Segments
from ..state import BranchedState
from .data import Batch
from .module import StackModule

SUMS = {"retention", "SSM", "WKV"}
"""Kinds of state whose size says something: a cache is as large as its entries."""


class Diagnostics(L.Callback):
    """Logs `diagnose` of a batch's first row every so many optimizer steps. It draws nothing: a run stays the same."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"diagnostics every {every} steps: give 1 or more")
        self.every, self.told = every, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every or step == self.told:  # an accumulated batch is no step
            return
        assert isinstance(pl_module, StackModule)
        self.told, document = step, None if batch.document is None else batch.document[:1]
        with trainer.precision_plugin.forward_context():
            found = diagnose(pl_module.model, batch.tokens[:1], document)
        for logger in trainer.loggers:
            logger.log_metrics(found, step - 1)


@torch.no_grad()
def diagnose(model: Stack, tokens: Tensor, document: Tensor | None = None) -> dict[str, float]:
    """NAME/LAYER -> value, of at most SPAN tokens [1, T]: decays and dt as their least, median and most.

    Of states that are sums, the root mean square after the tokens. document: [1, T], as in Segments.
    """
    found: dict[str, float] = {}
    mixers = list(dict.fromkeys(block.mixer for block in model.blocks))
    layers, was = count(), model.training

    def note(mixer: nn.Module, inputs: tuple[Tensor, Segments]) -> None:
        layer, told = next(layers), _of_mixer(cast(Mixer[Any], mixer), *inputs)
        found.update((f"{name}/{layer}", value.item()) for name, value in told)

    hooks = [mixer.register_forward_pre_hook(note) for mixer in mixers]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled layers do not look at hooks
            model.eval()(tokens[:, :SPAN], None if document is None else Segments(document=document[:, :SPAN]))
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    return found


def _of_mixer(mixer: Mixer[Any], x: Tensor, segments: Segments) -> Iterator[tuple[str, Tensor]]:
    for name, values in mixer.dynamics(x, segments).items():
        ordered = mixer.share.every(values.flatten()).sort().values
        last = ordered.numel() - 1
        for which, share in (("least", 0.0), ("median", 0.5), ("most", 1.0)):
            yield f"{name}_{which}", ordered[round(share * last)]
    _, state = mixer.chunkwise(x, mixer.init_state(x.shape[0], x.shape[1], x.device, x.dtype), segments)
    for part in state.branches if isinstance(state, BranchedState) else (state,):
        for name, tensor in part.tensors().items():
            if part.KINDS[name] in SUMS:
                yield f"{name}_rms", mixer.share.every(tensor.square().mean()[None]).mean().sqrt()
