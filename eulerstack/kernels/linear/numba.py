"""Few rows on a CPU: a step of decoding takes as long as its weights take to read.

One row reads the weights of stacks of 100M and 800M parameters at 1.07 to 1.35 of the rate of `weight.sum()`, PyTorch's
product at half of it (float32, torch 2.13 with MKL on two threads of an AMD EPYC and an Intel Xeon;
benchmarks/results/cpu_inference.md). Each number is summed by one thread, so that it does not depend on how many there
are.
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
from ..tracing import unless_traced
from . import FEW, onednn
from . import torch as reference

LEAST = 1 << 14  # numbers of weights below which the call itself takes longer
BLOCK = 4  # outputs of a run whose weights stay in a core's cache while all rows of x meet them
GRAIN = 1 << 16  # products that are worth one more thread


@unless_traced(reference.linear)
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
    if not readable(x, *weights) or not 0 < x.numel() <= FEW * inputs:
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
        begin, end = this_share(width)
        _rows(begin, end, weight, x, y[:, start : start + width])
        start += width


@compiled
def _rows(begin: Any, end: Any, weight: Any, x: Any, y: Any) -> None:
    """Outputs begin .. end - 1 of every row of x, in four runs that begin far apart.

    A core that follows four streams through memory reads 1.4 times as fast as along one. The runs are of one length,
    and overlap where four do not divide the outputs, so that each number is summed in the same way wherever it falls.
    """
    count, rows = end - begin, x.shape[0]
    length, fours = (count + 3) // 4, rows // 4 * 4
    second, third, fourth = (count - length) // 3, 2 * (count - length) // 3, count - length
    for first in range(0, length, BLOCK):
        last = min(length, first + BLOCK)
        for row in range(0, fours, 4):
            for at in range(begin + first, begin + last):
                _four_by_four(at, at + second, at + third, at + fourth, weight, x, y, row)
        for row in range(fours, rows):
            for at in range(begin + first, begin + last):
                _four_by_one(at, at + second, at + third, at + fourth, weight, x, y, row)


@compiled
def _four_by_one(i0: Any, i1: Any, i2: Any, i3: Any, weight: Any, x: Any, y: Any, row: Any) -> None:
    """Four outputs of one row."""
    a, b, c, d, x = weight[i0], weight[i1], weight[i2], weight[i3], x[row]
    a0 = b0 = c0 = d0 = y.dtype.type(0)
    for i in range(a.shape[0]):
        a0 += a[i] * x[i]
        b0 += b[i] * x[i]
        c0 += c[i] * x[i]
        d0 += d[i] * x[i]
    y[row, i0], y[row, i1], y[row, i2], y[row, i3] = a0, b0, c0, d0


@compiled
def _four_by_four(i0: Any, i1: Any, i2: Any, i3: Any, weight: Any, x: Any, y: Any, row: Any) -> None:
    """Four outputs of four rows at once: a number that was loaded is used four times."""
    a, b, c, d = weight[i0], weight[i1], weight[i2], weight[i3]
    x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = y.dtype.type(0)
    for i in range(a.shape[0]):
        a0 += a[i] * x0[i]
        a1 += a[i] * x1[i]
        a2 += a[i] * x2[i]
        a3 += a[i] * x3[i]
        b0 += b[i] * x0[i]
        b1 += b[i] * x1[i]
        b2 += b[i] * x2[i]
        b3 += b[i] * x3[i]
        c0 += c[i] * x0[i]
        c1 += c[i] * x1[i]
        c2 += c[i] * x2[i]
        c3 += c[i] * x3[i]
        d0 += d[i] * x0[i]
        d1 += d[i] * x1[i]
        d2 += d[i] * x2[i]
        d3 += d[i] * x3[i]
    for r, of in enumerate(((a0, b0, c0, d0), (a1, b1, c1, d1), (a2, b2, c2, d2), (a3, b3, c3, d3))):
        y[row + r, i0], y[row + r, i1], y[row + r, i2], y[row + r, i3] = of


PROVIDER = Provider(linear, openmp_refuses)
