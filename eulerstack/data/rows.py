"""Shards as rows of up to T + 1 tokens: cut end to end, or whole documents packed."""

import math
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from .corpus import Shard
from .packing import first_fit, pieces


class Item(NamedTuple):
    """A row of up to T + 1 tokens. carries: whether it goes on where the row before it, in its place, ended."""

    tokens: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    may: npt.NDArray[np.bool_]  # be a target
    carries: bool = False


NO_ROW = -1
"""The number of a row without a token: what fills the last batch where every rank needs as many."""


class RowSet(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


class Windows:
    """A shard cut into windows of T + 1 tokens, each sharing one token with the next: every token is a target once.

    The last window may be short.
    """

    def __init__(self, shard: Shard, seq_len: int) -> None:
        self.shard, self.seq_len = shard, seq_len

    def __len__(self) -> int:
        return max(1, math.ceil((len(self.shard.tokens) - 1) / self.seq_len))

    def __getitem__(self, index: int) -> Item:
        start = index * self.seq_len
        return _item(self.shard, np.arange(start, min(start + self.seq_len + 1, len(self.shard.tokens))))


class Streamed(Dataset[Item]):
    """Windows that know whether they go on in the document of the window before them.

    Number n is window n behind that one, and number n + W, of W windows, the same without anything before it.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Item:
        fresh, number = divmod(index, len(self))
        start = number * self.windows.seq_len
        before, own = self.windows.shard.document_at(np.array([start - 1, start])).tolist()
        return self.windows[number]._replace(carries=not fresh and number > 0 and before == own)


class Rows:
    """A shard's whole documents placed first-fit into rows of up to T + 1 tokens; longer documents are cut.

    Which documents share a row depends on the shard and T only.
    """

    def __init__(self, shard: Shard, seq_len: int) -> None:
        self.shard = shard
        begin, end = pieces(shard.starts, len(shard.tokens), seq_len)
        row = first_fit(end - begin, seq_len + 1)
        order = np.argsort(row, kind="stable")
        self.begin, self.end = begin[order], end[order]
        self.first = np.searchsorted(row[order], np.arange(row.max() + 2))

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> Item:
        here = slice(self.first[index], self.first[index + 1])
        return _item(self.shard, np.concatenate([*map(np.arange, self.begin[here], self.end[here])]))


PACKINGS: dict[str, type[Windows] | type[Rows]] = {"cut": Windows, "packed": Rows}


class Together(Dataset[Item]):
    """The rows of several sets, one set after the other; NO_ROW is a row without a token."""

    def __init__(self, sets: list[RowSet]) -> None:
        self.sets = sets
        self.ends = np.cumsum([len(one) for one in sets])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Item:
        if index == NO_ROW:
            return Item(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.bool_))
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.sets[which][index - int(self.ends[which - 1] if which else 0)]


def _item(shard: Shard, index: npt.NDArray[np.int64]) -> Item:
    """The tokens at these places of a shard."""
    return Item(np.asarray(shard.tokens[index]).astype(np.int64), shard.document_at(index), shard.counts_at(index))
