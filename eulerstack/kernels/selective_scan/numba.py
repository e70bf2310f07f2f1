"""The selective scan on a CPU: token by token, in loops over channels that Numba compiles to vector instructions.

A thread takes a row and a block of channels, whose states stay in its cache, through all tokens. For the backward the
forward keeps the states between chunks alone; those inside are computed again, one chunk at a time.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...segments import Segments
from ..compiled import compiled, exp, spread, view
from ..precision import without_autocast
from ..provider import Forms, Provider, on_cpu
from ..tracing import unless_traced
from . import torch as reference
from .torch import opens, parallel, recurrent

BLOCK = 64  # channels: wide enough for vector loops, and the states of some dozens each fit the first-level cache
GOES_ON, OPENS, PADDING = 0, 1, 2  # what a token does


@unless_traced(reference.chunkwise)
@without_autocast
def chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state`; the backward keeps a state every `chunk_size` tokens.

    Returns y [B, T, D], at least float32, and the state after the last real token.
    """
    if x.shape[1] == 0:
        return x.to(state.dtype), state
    inputs = (t.to(state.dtype).contiguous() for t in (x, dt, A.mT, B, C, state.mT))
    y, after = _Scan.apply(*inputs, _kinds(segments, *x.shape[:2]), min(chunk_size, x.shape[1]))
    return y, after.mT


def _kinds(segments: Segments, batch: int, tokens: int) -> Tensor:
    """[B, T] uint8: GOES_ON, OPENS or PADDING."""
    if segments.plain:
        return torch.zeros(batch, tokens, dtype=torch.uint8)
    kinds = OPENS * opens(segments) + PADDING * (segments.label < 0)
    return kinds.to(torch.uint8).contiguous()


class _Scan(torch.autograd.Function):
    """x, dt [B, T, D], A [N, D], B, C [B, T, N], state [B, N, D], kinds [B, T]; y [B, T, D] and the state after."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, kinds: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        chunks = -(-x.shape[1] // size)
        y, after = torch.zeros_like(x), torch.empty_like(state)
        kept = state.new_empty(state.shape[0], chunks, *state.shape[1:])
        spread(_forward_loop, x.shape[0] * _blocks(x), *view(x, dt, A, B, C, state, kinds, y, kept, after), size)
        ctx.save_for_backward(x, dt, A, B, C, kinds, kept)
        ctx.size = size
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, kinds, kept = ctx.saved_tensors
        for_y, for_after = (g.contiguous() for g in grads)
        for_x, for_dt, for_state = torch.zeros_like(x), torch.zeros_like(dt), torch.empty_like(for_after)
        for_A = torch.empty_like(for_after)  # of each row
        for_B, for_C = (t.new_zeros(_blocks(x), *t.shape) for t in (B, C))  # of each block
        arrays = view(x, dt, A, B, C, kinds, kept, for_y, for_after, for_x, for_dt, for_A, for_B, for_C, for_state)
        spread(_backward_loop, x.shape[0] * _blocks(x), *arrays, ctx.size)
        return for_x, for_dt, for_A.sum(0), for_B.sum(0), for_C.sum(0), for_state, None, None


def _blocks(x: Tensor) -> int:
    return -(-x.shape[2] // BLOCK)


@compiled
def _forward_loop(
    begin: Any, end: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any, kinds: Any, y: Any, kept: Any,
    after: Any, size: Any,
) -> None:  # fmt: skip
    D = x.shape[2]
    blocks = (D + BLOCK - 1) // BLOCK
    for at in range(begin, end):
        b, start = at // blocks, at % blocks * BLOCK
        stop = min(start + BLOCK, D)
        rates, held, fed = A[:, start:stop].copy(), state[b, :, start:stop].copy(), np.empty(stop - start, x.dtype)
        for t in range(x.shape[1]):
            if t % size == 0:
                _copy(held, kept[b, t // size, :, start:stop])
            if kinds[b, t] == OPENS:
                _clear(held)
            if kinds[b, t] != PADDING:
                step = dt[b, t, start:stop]
                _product(x[b, t, start:stop], step, fed)
                _advance(held, rates, step, fed, B[b, t], C[b, t], y[b, t, start:stop])
        _copy(held, after[b, :, start:stop])


@compiled
def _backward_loop(
    begin: Any, end: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, kinds: Any, kept: Any, for_y: Any, for_after: Any,
    for_x: Any, for_dt: Any, for_A: Any, for_B: Any, for_C: Any, for_state: Any, size: Any,
) -> None:  # fmt: skip
    N, D = A.shape
    blocks = (D + BLOCK - 1) // BLOCK
    for at in range(begin, end):
        b, i = at // blocks, at % blocks
        start, stop = i * BLOCK, min(i * BLOCK + BLOCK, D)
        rates, grad = A[:, start:stop].copy(), for_after[b, :, start:stop].copy()
        for_rates, for_fed = np.zeros_like(rates), np.empty(stop - start, x.dtype)
        before, fed = np.empty((size + 1, N, stop - start), x.dtype), np.empty((size, stop - start), x.dtype)
        for chunk in range(kept.shape[1] - 1, -1, -1):
            opening, tokens = chunk * size, min(size, x.shape[1] - chunk * size)
            _copy(kept[b, chunk, :, start:stop], before[0])
            for c in range(tokens):
                t = opening + c
                if kinds[b, t] == OPENS:
                    _clear(before[c])
                if kinds[b, t] == PADDING:
                    _copy(before[c], before[c + 1])
                    continue
                step = dt[b, t, start:stop]
                _product(x[b, t, start:stop], step, fed[c])
                _again(before[c], rates, step, fed[c], B[b, t], for_y[b, t, start:stop], before[c + 1], for_C[i, b, t])
            for c in range(tokens - 1, -1, -1):
                t = opening + c
                if kinds[b, t] == PADDING:
                    continue
                step, for_step = dt[b, t, start:stop], for_dt[b, t, start:stop]
                for_fed[:] = 0
                _retreat(
                    before[c], grad, rates, step, fed[c], B[b, t], C[b, t], for_y[b, t, start:stop],
                    for_rates, for_step, for_fed, for_B[i, b, t],
                )  # fmt: skip
                _unproduct(x[b, t, start:stop], step, for_fed, for_x[b, t, start:stop], for_step)
                if kinds[b, t] == OPENS:
                    _clear(grad)
        _copy(for_rates, for_A[b, :, start:stop])
        _copy(grad, for_state[b, :, start:stop])


@compiled
def _advance(held: Any, rates: Any, dt: Any, fed: Any, B: Any, C: Any, y: Any) -> None:
    """One token: the states [N, d] of d channels become those after it, and y [d], zero before, what it reads."""
    for n in range(held.shape[0]):
        own, rate, b, c = held[n], rates[n], B[n], C[n]
        for d in range(y.shape[0]):
            own[d] = exp(dt[d] * rate[d]) * own[d] + fed[d] * b
            y[d] += own[d] * c


@compiled
def _again(before: Any, rates: Any, dt: Any, fed: Any, B: Any, for_y: Any, after: Any, for_C: Any) -> None:
    """One token forwards again: the states after it, and the gradient of C, which needs them."""
    for n in range(before.shape[0]):
        own, rate, to, b, total = before[n], rates[n], after[n], B[n], for_C.dtype.type(0)
        for d in range(for_y.shape[0]):
            to[d] = exp(dt[d] * rate[d]) * own[d] + fed[d] * b
            total += to[d] * for_y[d]
        for_C[n] = total


@compiled
def _retreat(
    before: Any, grad: Any, rates: Any, dt: Any, fed: Any, B: Any, C: Any, for_y: Any,
    for_rates: Any, for_dt: Any, for_fed: Any, for_B: Any,
) -> None:  # fmt: skip
    """One token backwards: `grad`, of the states after it, becomes that of the states before it."""
    for n in range(before.shape[0]):
        was, own, rate, for_rate = before[n], grad[n], rates[n], for_rates[n]
        b, c, total = B[n], C[n], for_B.dtype.type(0)
        for d in range(for_y.shape[0]):
            after = own[d] + for_y[d] * c
            total += after * fed[d]
            for_fed[d] += after * b
            own[d] = after * exp(dt[d] * rate[d])
            for_log = own[d] * was[d]
            for_dt[d] += for_log * rate[d]
            for_rate[d] += for_log * dt[d]
        for_B[n] = total


@compiled
def _product(x: Any, dt: Any, fed: Any) -> None:
    for d in range(fed.shape[0]):
        fed[d] = x[d] * dt[d]


@compiled
def _unproduct(x: Any, dt: Any, for_fed: Any, for_x: Any, for_dt: Any) -> None:
    for d in range(for_fed.shape[0]):
        for_x[d] = for_fed[d] * dt[d]
        for_dt[d] += for_fed[d] * x[d]


@compiled
def _copy(source: Any, to: Any) -> None:
    for n in range(to.shape[0]):
        for d in range(to.shape[1]):
            to[n, d] = source[n, d]


@compiled
def _clear(states: Any) -> None:
    for n in range(states.shape[0]):
        for d in range(states.shape[1]):
            states[n, d] = 0


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), on_cpu)
