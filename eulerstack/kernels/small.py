"""PyTorch's small operations as loops of a recorded program: those whose results are the same however computed.

Sums, differences, products, copies: PyTorch takes two microseconds to come to what takes a tenth of one.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from .compiled import compiled, shared

aten = torch.ops.aten

LARGEST = 1 << 15
"""Numbers above which PyTorch's vectors and threads are worth asking for them."""
FAR = 1 << 40  # as long as an array is said to be whose length nobody asks

COPY, ADD, SUBTRACT, MULTIPLY, LARGER, REMAINDER, NEGATE = range(7)
DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}


class Loop(NamedTuple):
    """A `shared` function on fixed pointers, and what they point to. alone: one thread runs it, not each its share.

    failed: what holds a number other than 0 if it could not do what it was to do.
    """

    function: int
    pointers: Any
    threads: int
    kept: Any
    alone: bool = False
    failed: Any = (0,)


def loops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> list[Loop] | None:
    """What does the operation again; None where that is PyTorch's to do."""
    make = LOOPS.get(func)
    if make is None or any(kwargs.get(name, usual) != usual for name, usual in USUAL.items()):
        return None
    made = [*make(result, *args)]
    return None if None in made else made  # type: ignore[return-value]


USUAL = {"alpha": 1, "accumulate": False}

Made = Iterator[Loop | None]


def _pair(code: int, *dtypes: torch.dtype) -> Callable[..., Made]:
    """Of two that have the result's dtype, one of `dtypes` if there are any; the second may be a number."""

    def make(y: Tensor, a: Tensor, b: Any) -> Made:
        b = b if isinstance(b, Tensor) else torch.tensor(b, dtype=y.dtype)
        yield _elementwise(code, y, a, b) if y.dtype == a.dtype == b.dtype and y.dtype in (dtypes or DTYPES) else None

    return make


def _from(y: Tensor, a: Tensor, number: float, alpha: float = 1) -> Made:
    yield from _pair(SUBTRACT)(y, torch.tensor(number, dtype=y.dtype), a) if alpha == 1 else [None]


def _negative(y: Tensor, a: Tensor) -> Made:
    yield _elementwise(NEGATE, y, a, a) if y.dtype == a.dtype else None


def _copy(y: Tensor, a: Tensor, *_: Any) -> Made:
    yield _elementwise(COPY, y, a, a)


def _copy_into(y: Tensor, _: Tensor, a: Tensor, *more: Any) -> Made:
    yield _elementwise(COPY, y, a, a)


def _joined(y: Tensor, parts: Sequence[Tensor], dim: int = 0) -> Made:
    parts = [part for part in parts if part.numel()]
    for into, part in zip(y.split([part.shape[dim] for part in parts], dim), parts, strict=True):
        yield _elementwise(COPY, into, part, part)


def _elementwise(code: int, y: Tensor, a: Tensor, b: Tensor) -> Loop | None:
    tensors = [t if t.shape == y.shape else t.expand(y.shape) for t in (y, a, b)]
    dims = _dims(y.shape, [t.stride() for t in tensors])
    if not 0 < y.numel() <= LARGEST or len(dims) > 3 or y.dtype not in DTYPES or a.dtype not in DTYPES:
        return None
    dims = [(1, (0, 0, 0))] * (3 - len(dims)) + dims
    sizes = [code, *(size for size, _ in dims), *(steps[i] for i in range(3) for _, steps in dims)]
    return _loop(_over(y.dtype, a.dtype), sizes, tensors)


def _put(y: Tensor, _: Tensor, index: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Made:
    """y[i, j] = values, for int64 i and j that have one dimension between them, in rows of float32 in one piece."""
    if accumulate or len(index) != 2 or y.dim() < 2 or any(i is None or i.dtype != torch.int64 for i in index):
        yield None
        return
    i, j = torch.broadcast_tensors(*index)
    values = values.expand(*i.shape, *y.shape[2:])
    width = y[0, 0].numel()
    dims = _dims(i.shape, [i.stride(), j.stride(), values.stride()[: i.dim()]])
    whole = all(_dims(t.shape, [t.stride()]) in ([], [(width, (1,))]) for t in (y[0, 0], values[(0,) * i.dim()]))
    if not whole or len(dims) > 1 or not y.dtype == values.dtype == torch.float32 or not 0 < values.numel() <= LARGEST:
        yield None
        return
    ((count, steps),) = dims or [(1, (0, 0, 0))]
    loop = _loop(_put_rows, [0, count, width, *steps, *y.shape[:2], *y.stride()[:2]], (y, values, i, j))
    yield loop._replace(failed=loop.kept[0])


def _loop(function: Callable[[Any], None], sizes: Sequence[int], tensors: Sequence[Tensor]) -> Loop:
    given = (ctypes.c_int64 * len(sizes))(*sizes)
    pointers = (ctypes.c_void_p * (1 + len(tensors)))(ctypes.addressof(given), *[t.data_ptr() for t in tensors])
    return Loop(shared(function), pointers, 1, (given, tensors), alone=True)


def _dims(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """Sizes and steps of the fewest dimensions that lead through all numbers, the innermost last."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if found and all(outer == size * step for outer, step in zip(found[-1][1], steps, strict=True)):
            found[-1] = (size * found[-1][0], tuple(steps))
        else:
            found.append((size, tuple(steps)))
    return found


@cache
def _over(into: torch.dtype, of: torch.dtype) -> Callable[[Any], None]:
    """The loop over numbers of these dtypes."""
    left: Any = DTYPES[into]
    right: Any = DTYPES[of]

    def every(pointers: Any) -> None:
        y, a, b = carray(pointers[1], FAR, left), carray(pointers[2], FAR, right), carray(pointers[3], FAR, right)
        _every(carray(pointers[0], 13, np.int64), y, a, b)

    return every


@compiled
def _every(sizes: Any, y: Any, a: Any, b: Any) -> None:
    for i in range(sizes[1]):
        for j in range(sizes[2]):
            into, first = y[i * sizes[4] + j * sizes[5] :], a[i * sizes[7] + j * sizes[8] :]
            second, dense = b[i * sizes[10] + j * sizes[11] :], sizes[6] == 1 and sizes[9] == 1
            if dense and sizes[12] == 1:  # in vectors, which need to know it
                _line(sizes[0], sizes[3], into, 1, first, 1, second, 1)
            elif dense and sizes[12] == 0:
                _line(sizes[0], sizes[3], into, 1, first, 1, second, 0)
            else:
                _line(sizes[0], sizes[3], into, sizes[6], first, sizes[9], second, sizes[12])


@partial(compiled, inline=True)
def _line(code: Any, count: Any, y: Any, y_step: Any, a: Any, a_step: Any, b: Any, b_step: Any) -> None:  # noqa: PLR0912
    if code == COPY:
        for n in range(count):
            y[n * y_step] = a[n * a_step]
    elif code == ADD:
        for n in range(count):
            y[n * y_step] = a[n * a_step] + b[n * b_step]
    elif code == SUBTRACT:
        for n in range(count):
            y[n * y_step] = a[n * a_step] - b[n * b_step]
    elif code == MULTIPLY:
        for n in range(count):
            y[n * y_step] = a[n * a_step] * b[n * b_step]
    elif code == LARGER:
        for n in range(count):
            y[n * y_step] = max(a[n * a_step], b[n * b_step])
    elif code == REMAINDER:
        for n in range(count):
            y[n * y_step] = a[n * a_step] % b[n * b_step]
    else:
        for n in range(count):
            y[n * y_step] = -a[n * a_step]


def _put_rows(pointers: Any) -> None:
    sizes: Any = carray(pointers[0], 10, np.int64)
    count, width, i_step, j_step, step, rows, columns, row, column = sizes[1:]
    y: Any = carray(pointers[1], FAR, np.float32)
    values: Any = carray(pointers[2], FAR, np.float32)
    first: Any = carray(pointers[3], FAR, np.int64)
    second: Any = carray(pointers[4], FAR, np.int64)
    for n in range(count):
        i, j = first[n * i_step], second[n * j_step]
        i, j = i + rows * (i < 0), j + columns * (j < 0)
        if i < 0 or i >= rows or j < 0 or j >= columns:
            sizes[0] = 1
        else:
            for k in range(width):
                y[i * row + j * column + k] = values[n * step + k]


LOOPS: dict[Any, Callable[..., Made]] = {
    aten.add.Tensor: _pair(ADD),
    aten.add_.Tensor: _pair(ADD),
    aten.sub.Tensor: _pair(SUBTRACT),
    aten.sub_.Tensor: _pair(SUBTRACT),
    aten.mul.Tensor: _pair(MULTIPLY),
    aten.mul_.Tensor: _pair(MULTIPLY),
    aten.rsub.Scalar: _from,
    aten.neg.default: _negative,
    aten.copy_.default: _copy_into,
    aten.clone.default: _copy,
    aten.contiguous.default: _copy,
    aten._to_copy.default: _copy,
    aten.to.dtype: _copy,
    aten.cat.default: _joined,
    aten.index_put_.default: _put,
    aten.maximum.default: _pair(LARGER, torch.int64),
    aten.remainder.Scalar: _pair(REMAINDER, torch.int64),
}
"""Which can be, and what makes them of the result and the arguments."""
