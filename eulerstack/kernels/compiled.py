"""Loops that Numba compiles for a CPU, and what they need: views of tensors, threads, an exponential."""

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from itertools import pairwise
from threading import local
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from .provider import Target, on_cpu
from .shapes import has_memory, is_plain
from .tracing import is_traced

Loop = Callable[..., Any]

FAST_MATH = {"contract", "nsz", "reassoc", "arcp"}  # sums may be reordered; NaN and infinity keep their meaning


def compiled(function: Loop, inline: bool = False) -> Loop:
    """The function, compiled for the types it is called with and kept on disk; it runs without Python's lock.

    inline: become part of each loop that calls it, which then knows the numbers that it is called with.
    """
    how = {"inline": "always" if inline else "never"}
    made: Loop = _kept(partial(numba.njit, function, nogil=True, fastmath=FAST_MATH, error_model="numpy", **how))
    return made


def _kept(make: Callable[..., Any]) -> Any:
    """What Numba makes, kept on disk; where no folder can be written to, it is made anew by every process."""
    try:
        return make(cache=True)
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
        return make()


class _Heard(local):
    """`by`: who wants to hear of all that runs in this thread without PyTorch's knowing (recording.py)."""

    by: Any = None


heard = _Heard()


def spread(loop: Loop, count: int, *rest: Any) -> None:
    """loop(begin, end, *rest) over 0 .. count - 1, a share for each of PyTorch's threads.

    Nothing where `view` found no memory: the results have their shapes already.
    """
    if any(array is None for array in rest):
        return
    if heard.by is not None:
        heard.by.call(partial(spread, loop, count, *rest))
    shares = max(1, min(torch.get_num_threads(), count))
    *others, mine = pairwise([count * i // shares for i in range(shares + 1)])
    waiting = [_pool().submit(loop, *share, *rest) for share in others]
    loop(*mine, *rest)
    for share in waiting:
        share.result()


@cache
def _pool() -> ThreadPoolExecutor:
    """Python's threads, because Numba's own abort a process that forks, or one that calls from two threads."""
    return ThreadPoolExecutor(os.cpu_count(), "eulerstack")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


@cache
def openmp() -> Any:
    """GOMP_parallel(function, its argument, threads, 0), which runs a C function on PyTorch's own threads.

    They take over within 5 microseconds, where `spread` needs 50. None where PyTorch has other threads than GNU's.
    """
    try:
        loaded = ctypes.CDLL(None)  # what this process has loaded already
        run, _ = loaded.GOMP_parallel, loaded.omp_get_thread_num
    except (AttributeError, TypeError, OSError):
        return None
    run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


def openmp_refuses(target: Target, **needs: Any) -> str | None:
    """The answer of kernels for few rows of float32 on PyTorch's own threads."""
    if on_cpu(target):
        return on_cpu(target)
    if target.dtype != torch.float32:
        return "computes in float32 only"
    return "finds no GNU OpenMP behind this PyTorch" if openmp() is None else None


def readable(*tensors: Tensor) -> bool:
    """Whether these are float32 on a CPU, want no gradient and stand for no others, and no trace is made."""
    grads = torch.is_grad_enabled()
    for tensor in tensors:
        if not is_plain(tensor) or (grads and tensor.requires_grad):
            return False
    return not is_traced()


@cache
def shared(function: Loop) -> int:
    """The address of a C function of one argument, pointers: to sizes (int64), then to the numbers of tensors.

    Compiled when first asked for. Every thread runs it, for its own `this_share`.
    """
    signature = types.void(types.CPointer(types.voidptr))
    made = _kept(
        lambda cache=False: numba.cfunc(signature, fastmath=FAST_MATH, error_model="numpy", cache=cache)(function)
    )
    return int(made.address)


def on_openmp(function: int, tensors: Sequence[Tensor], sizes: Sequence[int], threads: int) -> None:
    """Run a `shared` function on the numbers of contiguous tensors, and wait for it."""
    given = (ctypes.c_int64 * len(sizes))(*sizes)
    pointers = (ctypes.c_void_p * (1 + len(tensors)))(ctypes.addressof(given), *[t.data_ptr() for t in tensors])
    if heard.by is not None:
        heard.by.loop(function, pointers, threads, given, tensors)
    openmp()(function, pointers, threads, 0)


@compiled
def this_share(count: Any) -> Any:
    """begin and end of the part of 0 .. count - 1 that is this thread's."""
    this, threads = this_thread(), _threads()
    return count * this // threads, count * (this + 1) // threads


this_thread: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads: Any = types.ExternalFunction("omp_get_num_threads", types.int32())


def view(*tensors: Tensor) -> list[Any]:
    """Arrays that share the tensors' memory; None for a tensor that has none.

    Raises ValueError for tensors that are not on the CPU.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"these kernels were chosen for a CPU, and got a tensor on {tensor.device}: {_FIX}")
    with nullcontext() if heard.by is None else torch._C._DisableTorchDispatch():  # `spread` tells what is done to them
        return [tensor.detach().numpy() if has_memory(tensor) else None for tensor in tensors]


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
