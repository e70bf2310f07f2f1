"""Which rows each batch holds: functions of the batch's number, whatever the workers and ranks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from .rows import NO_ROW

NEAR = 16
"""Blocks of rows, fetched together, whose rows are mixed."""


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


class Permutation:
    """Permutations of so many rows, each a function of its seed; the last one is kept. block: see `permuted`."""

    def __init__(self, rows: int, block: int | None = None) -> None:
        self.rows, self.block = rows, block
        self._drawn: tuple[tuple[int | None, ...], npt.NDArray[np.int64]] = ((), np.empty(0, dtype=np.int64))

    def __call__(self, seed: int | None, *more: int) -> npt.NDArray[np.int64]:
        """Without a seed, the rows in their order."""
        key = (seed, *more)
        if self._drawn[0] != key:
            self._drawn = key, np.arange(self.rows) if seed is None else permuted((seed, *more), self.rows, self.block)
        return self._drawn[1]


class InOrder(Order):
    """All rows from the first, each time; the last batch may be short."""

    def __init__(self, rows: int, batch_size: int, share: tuple[int, int] = (0, 1)) -> None:
        super().__init__(batch_size, None, share)
        self.rows = rows

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def batch(self, at: int) -> list[int]:
        return list(range(at * self.batch_size, min(self.rows, (at + 1) * self.batch_size)))


class Repeated(Order):
    """The first `count` batches of another order, again and again."""

    def __init__(self, order: Order, count: int, seed: int) -> None:
        super().__init__(order.batch_size, seed, order.share)
        self.order, self.count = order, count

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, at: int) -> list[int]:
        return self.order.batch(at % self.count)


class Shuffled(Order):
    """A fresh permutation each epoch, a function of (seed, epoch) alone; whole batches of it. block: see `permuted`.

    Without a seed, here and in the orders below, the rows come in their order.
    """

    def __init__(
        self, rows: int, batch_size: int, seed: int | None, share: tuple[int, int] = (0, 1), block: int | None = None
    ) -> None:
        super().__init__(batch_size, seed, share)
        self.rows = rows
        self._permutation = Permutation(rows, block)

    def __len__(self) -> int:
        return max(1, self.rows // self.batch_size)

    def batch(self, at: int) -> list[int]:
        epoch, batch = divmod(at, len(self))
        order = self._permutation(self.seed, epoch)
        rows: list[int] = order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
        return rows


class Mixed(Order):
    """Sources in fixed shares of the rows, each through permutations of its own, one after the other.

    Which source row n of the run is from is a function of n: after n rows each has given n times its share, to within
    one. The permutation is a function of (seed, the source's epoch, the source). One epoch of the whole is as many
    batches as all sources have rows for, however often each is read in it.

    shares: add up to one.
    """

    def __init__(
        self,
        sizes: list[int],
        shares: list[Fraction],
        batch_size: int,
        seed: int | None,
        share: tuple[int, int] = (0, 1),
        blocks: list[int | None] | None = None,
    ) -> None:
        super().__init__(batch_size, seed, share)
        self.sizes = sizes
        self.permutations = [Permutation(*one) for one in zip(sizes, blocks or [None] * len(sizes), strict=True)]
        self.begins = [sum(sizes[:which]) for which in range(len(sizes))]
        self.of_rest = [one / sum(shares[which:]) for which, one in enumerate(shares)]

    def __len__(self) -> int:
        return max(1, sum(self.sizes) // self.batch_size)

    def batch(self, at: int) -> list[int]:
        return [self._row(*self.source(n)) for n in range(at * self.batch_size, (at + 1) * self.batch_size)]

    def source(self, n: int) -> tuple[int, int]:
        """Which source row n of the run is from, and how many that source gave before it.

        The first source takes its share evenly, the second its share of what is left, and so on.
        """
        for which, share in enumerate(self.of_rest):
            before = _rounded(n * share)
            if _rounded((n + 1) * share) > before:
                return which, before
            n -= before
        raise AssertionError("the last source takes all that is left")

    def _row(self, which: int, nth: int) -> int:
        epoch, at = divmod(nth, self.sizes[which])
        return self.begins[which] + int(self.permutations[which](self.seed, epoch, which)[at])


def permuted(seed: tuple[int, ...], rows: int, block: int | None = None) -> npt.NDArray[np.int64]:
    """A permutation of the rows. block: rows that are fetched together; those of NEAR such blocks come side by side."""
    draw = np.random.default_rng(seed)
    if block is None:
        return draw.permutation(rows)
    blocks = draw.permutation(-(-rows // block))
    parts = [
        draw.permutation(np.concatenate([np.arange(b * block, min(rows, (b + 1) * block)) for b in some]))
        for some in np.split(blocks, np.arange(NEAR, len(blocks), NEAR))
    ]
    return np.concatenate(parts)


def _rounded(number: Fraction) -> int:
    return (2 * number.numerator + number.denominator) // (2 * number.denominator)


class InStreams(Order):
    """Each of the B rows of a batch goes through a part of the rows of its own, in their order.

    An epoch begins at a row that is a function of (seed, epoch) and goes round, so that no end is left out each time.
    Row n is numbered n behind the one before it, and n + `rows` where an epoch begins.
    """

    def __init__(self, rows: int, batch_size: int, seed: int | None, share: tuple[int, int] = (0, 1)) -> None:
        super().__init__(batch_size, seed, share)
        self.rows = rows
        if rows < batch_size:
            raise ValueError(
                f"data.carry_state needs a stretch of text for each of data.batch_size = {batch_size} rows, and the "
                f"text has {rows} rows in all; give a smaller data.batch_size or data.seq_len"
            )

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def batch(self, at: int) -> list[int]:
        epoch, step = divmod(at, len(self))
        begin = 0 if self.seed is None else int(np.random.default_rng((self.seed, epoch)).integers(self.rows))
        rows = [(begin + slot * len(self) + step) % self.rows for slot in range(self.batch_size)]
        return [row if step else row + self.rows for row in rows]
