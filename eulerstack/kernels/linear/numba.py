"""Few rows on a CPU: a step of decoding takes as long as its weights take to read.

One row reads them at 75 % (256 x 256) to 100 % (32,000 x 768) of the rate of `weight.sum()`, where PyTorch's product
reaches 20 to 45 %; 4 rows are 1.8 to 4 times as fast as PyTorch's, 16 rows 1.4 to 3 times and 32 rows 1.3 to 2.6 times
(float32, torch 2.13 with MKL on two threads of an AMD EPYC). Each number is summed by one thread, so that it does not
depend on how many there are.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from ..compiled import compiled, on_openmp, openmp_refuses, readable, shared, this_share
from ..provider import Provider, Target
from . import FEW, onednn
from . import torch as reference

LEAST = 1 << 14  # numbers of weights below which the call itself takes longer
BLOCK = 16  # rows of a weight that stay in a core's cache while all rows of x meet them
GRAIN = 1 << 16  # products that are worth one more thread


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Up to FEW rows of float32 that want no gradient by the loops below, all weights in one call; many by oneDNN."""
    if not _serves(x, weights):
        return _many()(x, weights, biases)
    y = _products(x.contiguous(), weights)
    return y if biases[0] is None else y.add_(torch.cat(cast(list[Tensor], list(biases))))


@cache
def _many() -> Callable[..., Tensor]:
    return onednn.linear if onednn.refuses(Target()) is None else reference.linear


def _serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    inputs, numbers = x.shape[-1], 0
    if not 0 < x.numel() <= FEW * inputs or not readable(x, *weights):
        return False
    for weight in weights:
        if weight.shape[-1] != inputs or not weight.is_contiguous():
            return False
        numbers += weight.numel()
    return numbers >= LEAST and not torch.is_autocast_enabled("cpu")


def _products(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x W^T of contiguous tensors, for each W."""
    inputs, widths = x.shape[-1], [weight.shape[0] for weight in weights]
    total, count, rows = sum(widths), len(widths), x.numel() // inputs
    y = x.new_empty(*x.shape[:-1], total)
    threads = min(torch.get_num_threads(), 1 + rows * inputs * total // GRAIN)
    on_openmp(shared(_share), (x, y, *weights), (rows, inputs, total, count, *widths), threads)
    return y


def _share(pointers: Any) -> None:
    """What each thread does."""
    sizes: Any = carray(pointers[0], 4, np.int64)
    rows, inputs, total, count = sizes
    widths: Any = carray(pointers[0], 4 + count, np.int64)
    x = carray(pointers[1], (rows, inputs), np.float32)
    y = carray(pointers[2], (rows, total), np.float32)
    start = 0
    for part in range(count):
        width = widths[4 + part]
        weight = carray(pointers[3 + part], (width, inputs), np.float32)
        begin, end = this_share((width + 1) // 2)
        _rows(2 * begin, min(width, 2 * end), weight, x, y[:, start : start + width])
        start += width


@compiled
def _rows(begin: Any, end: Any, weight: Any, x: Any, y: Any) -> None:
    """Outputs begin .. end - 1 of every row of x."""
    rows = x.shape[0]
    fours = rows // 4 * 4
    for first in range(begin, end, BLOCK):
        last = min(end, first + BLOCK)
        even = first + (last - first) // 2 * 2
        for row in range(0, fours, 4):
            _two_by_four(first, even, weight, x, y, row)
            for four in range(row, row + 4):
                _one_by_one(even, last, weight, x, y, four)
        for row in range(fours, rows):
            _one_by_one(first, last, weight, x, y, row)


@compiled
def _one_by_one(begin: Any, end: Any, weight: Any, x: Any, y: Any, row: Any) -> None:
    x = x[row]
    for output in range(begin, end):
        w, total = weight[output], y.dtype.type(0)
        for i in range(w.shape[0]):
            total += w[i] * x[i]
        y[row, output] = total


@compiled
def _two_by_four(begin: Any, end: Any, weight: Any, x: Any, y: Any, row: Any) -> None:
    """Two outputs of four rows at once: a number that was loaded is used two or four times."""
    x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
    for output in range(begin, end, 2):
        v, w = weight[output], weight[output + 1]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = y.dtype.type(0)
        for i in range(v.shape[0]):
            a0 += v[i] * x0[i]
            a1 += v[i] * x1[i]
            a2 += v[i] * x2[i]
            a3 += v[i] * x3[i]
            b0 += w[i] * x0[i]
            b1 += w[i] * x1[i]
            b2 += w[i] * x2[i]
            b3 += w[i] * x3[i]
        y[row, output], y[row + 1, output], y[row + 2, output], y[row + 3, output] = a0, a1, a2, a3
        y[row, output + 1], y[row + 1, output + 1], y[row + 2, output + 1], y[row + 3, output + 1] = b0, b1, b2, b3


PROVIDER = Provider(linear, openmp_refuses)
