"""Which rows each batch holds: functions of the batch's number, whatever the workers and ranks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from .rows import NO_ROW


class Order(Sampler[list[int]], ABC):
    """Batches of row numbers. Batch number `at` is the same on any number of ranks; each takes its share of it.

    share: this rank and their number; rank r of n has rows r B / n to (r + 1) B / n of each batch of B.
    Each iteration is len(self) batches and goes on where the last one stopped, so that a limited epoch, a resumed one
    and one that ran to its end leave the same order behind. `taken` counts the batches of all ranks together.
    """

    def __init__(self, batch_size: int, seed: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
        if batch_size % share[1]:
            raise ValueError(
                f"data.batch_size = {batch_size} is no multiple of the {share[1]} devices that share its rows; "
                "give one that is, or another trainer.devices"
            )
        self.batch_size, self.seed, self.share, self.taken = batch_size, seed, share, 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, at: int) -> list[int]:
        """The rows of batch number `at`, of all ranks."""

    def __iter__(self) -> Iterator[list[int]]:
        for at in range(self.taken, self.taken + len(self)):
            yield self._mine(self.batch(at))

    def _mine(self, rows: list[int]) -> list[int]:
        """This rank's; a short batch is filled where there are several, since they take their steps together."""
        rank, of = self.share
        if of == 1:
            return rows
        each = self.batch_size // of
        return [*rows, *[NO_ROW] * (self.batch_size - len(rows))][rank * each : (rank + 1) * each]


class InOrder(Order):
    """All rows from the first, each time; the last batch may be short."""

    def __init__(self, rows: int, batch_size: int, share: tuple[int, int] = (0, 1)) -> None:
        super().__init__(batch_size, None, share)
        self.rows = rows

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def batch(self, at: int) -> list[int]:
        return list(range(at * self.batch_size, min(self.rows, (at + 1) * self.batch_size)))


class Shuffled(Order):
    """A fresh permutation each epoch, a function of (seed, epoch) alone; whole batches of it."""

    def __init__(self, rows: int, batch_size: int, seed: int, share: tuple[int, int] = (0, 1)) -> None:
        super().__init__(batch_size, seed, share)
        self.rows = rows
        self._drawn: tuple[tuple[int | None, int], npt.NDArray[np.int64]] = ((None, -1), np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return max(1, self.rows // self.batch_size)

    def batch(self, at: int) -> list[int]:
        epoch, batch = divmod(at, len(self))
        rows: list[int] = self._permutation(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
        return rows

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._drawn[0] != (self.seed, epoch):
            assert self.seed is not None
            self._drawn = (self.seed, epoch), np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return self._drawn[1]
