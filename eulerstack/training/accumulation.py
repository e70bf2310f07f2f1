"""Accumulated batches: a step's gradient is that of one batch of all their rows.

Every loss is a mean over something that a batch has: its targets, those that stand further ahead, its tokens. How many
there are in a step is known before its first backward, because its batches are read ahead. So each batch's losses are
weighted by its share of them, and no gradient is divided afterwards.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from torch import Tensor

from ..data.batches import Batch
from ..layers.loss import Average
from ..multitoken import later_targets
from ..segments import IGNORED, Segments

TOKENS, TARGETS, AHEAD = 0, 1, 2
"""Places in a batch's counts: its tokens, its targets, and from here on those of each module that looks ahead."""
OVER = {"cross_entropy": TARGETS, "z": TARGETS, "load_balance": TOKENS, "router_z": TOKENS}
"""What each loss is a mean over. The balance of experts is none; a batch's counts by its tokens."""


def count(batch: Batch, ahead: int) -> Tensor:
    """[2 + ahead] float64, what a batch has to take means over; `ahead` modules look further ahead."""
    segments = batch.segments() or Segments()
    further = [later_targets(batch.targets, steps, segments) for steps in range(1, ahead + 1)]
    found = [batch.tokens.numel(), *(int((targets != IGNORED).sum()) for targets in (batch.targets, *further))]
    return torch.tensor(found, dtype=torch.float64)


class Accumulation:
    """The batches of one optimizer step, of which some have been trained on."""

    def __init__(self) -> None:
        self.begin([])

    def begin(self, counts: list[Tensor]) -> None:
        """A step of batches with these counts."""
        self._counts, self._shares, self._at = counts, torch.empty(0), 0
        self._means: dict[str, tuple[Tensor, Tensor]] = {}

    def weighted(self, parts: dict[str, Tensor], average: Average) -> tuple[Tensor, dict[str, Tensor]]:
        """The next batch's part of the step's loss, and the losses of the step so far, without gradient.

        parts: as `Stack.losses` names them. average: the mean over the ranks that share a batch.
        """
        if self._at == 0:
            counts = average(torch.stack(self._counts))
            self._shares = counts / counts.sum(0).clamp(min=1e-9)
        shares, self._at = self._shares[self._at], self._at + 1
        own = []
        for name, part in parts.items():
            if name in OVER or name.startswith("ahead/"):
                share = shares[_place(name)].to(part)
                own.append(part * share)
                done, seen = self._means.get(name, (torch.zeros_like(share), torch.zeros_like(share)))
                self._means[name] = (done + own[-1].detach(), seen + share)
        return torch.stack(own).sum(), self._so_far()

    def _so_far(self) -> dict[str, Tensor]:
        means = {name: done / (seen + (seen == 0)) for name, (done, seen) in self._means.items()}
        ahead = [means.pop(name) for name in list(means) if name.startswith("ahead/")]
        return {**means, "multi_token": torch.stack(ahead).sum()} if ahead else means


def _place(name: str) -> int:
    """Where in the counts stands what a loss is a mean over."""
    return OVER[name] if name in OVER else AHEAD + int(name.rpartition("/")[2]) - 1


class StepFetcher(_PrefetchDataFetcher):
    """Hands batches to Lightning one by one, and reads those of an optimizer step together.

    At the end of a step nothing is read ahead, so that a loader's place in a checkpoint is that of the run. `place` is
    what a checkpoint in the middle of one should hold.
    """

    def __init__(self, trainer: L.Trainer, begin: Callable[[list[Any]], None]) -> None:
        super().__init__()
        replaced = trainer.fit_loop._data_fetcher
        assert isinstance(replaced, _PrefetchDataFetcher)
        vars(self).update(vars(replaced))
        self.trainer, self.begin = trainer, begin
        self.place: list[Any] | None = None
        self._ahead: list[tuple[Any, bool, list[Any]]] = []

    def __next__(self) -> Any:
        if not self._ahead:
            self._read()
        item, self.done, place = self._ahead.pop(0)
        self.place = place if self._ahead else None
        return item

    def _read(self) -> None:
        """The batches that are left of the step, or of the epoch. Raises StopIteration where there is none."""
        every = self.trainer.accumulate_grad_batches
        left = every - self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % every
        while len(self._ahead) < left and not (self._ahead and self.done):
            try:
                item = super().__next__()
            except StopIteration:
                if not self._ahead:
                    raise
                self._ahead[-1] = (self._ahead[-1][0], True, self._ahead[-1][2])
                break
            self._ahead.append((item, self.done, self.combined_loader._state_dicts()))
        self.begin([batch for (batch, *_), *_ in self._ahead])

    def reset(self) -> None:
        super().reset()
        self._ahead, self.place = [], None
