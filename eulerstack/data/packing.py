"""Whole documents placed into rows, first fit."""

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]
OPEN = 256
"""Rows that are looked through for room. Where none has any, the fullest of them closes."""


def pieces(starts: Places, total: int, seq_len: int) -> tuple[Places, Places]:
    """Where each piece begins and ends: a document of up to seq_len + 1 tokens, or a cut of a longer one.

    starts: [documents], of `total` tokens. Cuts share one token with the next, so that every token is a target once.
    """
    ends = np.append(starts[1:], total)
    counts = np.maximum(1, -(-(ends - starts - 1) // seq_len))
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    begin = np.repeat(starts, counts) + nth * seq_len
    return begin, np.minimum(begin + seq_len + 1, np.repeat(ends, counts))


def first_fit(sizes: Places, capacity: int) -> Places:
    """The row of each piece: the first open one with room for it. Sizes are at most `capacity`."""
    room, row = np.full(OPEN, -1), np.full(OPEN, -1)
    placed = np.empty(len(sizes), dtype=np.int64)
    rows = 0
    for piece, size in enumerate(sizes):
        slot = int(np.argmax(room >= size))
        if room[slot] < size:
            slot = int(room.argmin())
            room[slot], row[slot] = capacity, rows
            rows += 1
        room[slot] -= size
        placed[piece] = row[slot]
    return placed
