"""Loops that Numba compiles for a CPU, and what they need: views of tensors, a parallel range, an exponential."""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import overload
from torch import Tensor

Loop = Callable[..., Any]

FAST_MATH = {"contract", "nsz", "reassoc", "arcp"}  # sums may be reordered; NaN and infinity keep their meaning

grid = numba.prange  # a range whose steps run on several threads


def compiled(function: Loop) -> Loop:
    """The function, compiled for the types it is called with and kept on disk; its `grid` runs on several threads."""
    made: Loop = numba.njit(function, parallel=True, fastmath=FAST_MATH, error_model="numpy", cache=True)
    return made


def part(function: Loop) -> Loop:
    """A function that compiled ones call, on their thread."""
    made: Loop = numba.njit(function, fastmath=FAST_MATH, error_model="numpy", cache=True)
    return made


def view(*tensors: Tensor) -> list[Any]:
    """Arrays that share the tensors' memory.

    Raises ValueError for tensors that are not on the CPU.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"these kernels were chosen for a CPU, and got a tensor on {tensor.device}: {_FIX}")
    return [tensor.detach().numpy() for tensor in tensors]


_FIX = "build the stack for the device it runs on, build(spec, device=...), or with kernels='torch'"


def exp(x: Any) -> Any:
    """The exponential of a number, at most 1e38; in float32 it compiles to vector instructions."""
    return math.exp(x)


@overload(exp, inline="always")
def _exp_of(x: Any) -> Any:
    return _exp_float32 if x == numba.float32 else _exp_float64


def _exp_float64(x: Any) -> Any:
    return math.exp(x)


LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
LOWEST, HIGHEST = np.float32(-60), np.float32(88.37)
C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(i)) for i in range(2, 8))


def _exp_float32(x: Any) -> Any:
    """2^k e^r with |r| <= ln(2) / 2 and Taylor's polynomial of r: within 1e-7.

    Below e^-60 it is 0: what such a weight adds is lost in rounding, and products with it would be denormal, which
    a CPU computes a hundred times slower.
    """
    at = min(max(x, LOWEST), HIGHEST)
    whole = np.float32(np.rint(at * LOG2_E))
    r = (at - whole * LN2_HIGH) - whole * LN2_LOW
    tail = C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    y = (np.float32(1) + r + r * r * tail) * power
    return np.float32(0) if x < LOWEST else y
