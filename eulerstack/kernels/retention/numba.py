"""Retention on a CPU: PyTorch's batched products, and all between them in loops that Numba compiles.

The same chunks as the PyTorch provider's, forward and backward written out, so that what is not a matrix product
passes through memory once. Arrays in compiled code: B rows, n chunks of C tokens, H = G R value heads.
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
from .step import recurrent
from .torch import decays_of, in_spans, parallel


@unless_traced(reference.chunkwise)
@without_autocast
def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Equation 7: T tokens that continue `state`, in chunks of at most `chunk_size`."""
    return in_spans(_span, q, k, v, log_decay, state, segments, chunk_size)


def _span(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments, size: int
) -> tuple[Tensor, Tensor]:
    """A whole number of chunks of `size` tokens."""
    tokens, dtype = v.shape[1], state.dtype
    decays = decays_of(log_decay, segments, tokens, size, dtype)
    label = None if segments.plain else segments.label.unflatten(1, (-1, size)).contiguous()
    between = (decays.total, decays.entering, decays.leaving, decays.across)
    y, after = _Span.apply(*(t.to(dtype) for t in (q, k, v)), state, *(t.contiguous() for t in between), label, size)
    return y, after


class _Span(torch.autograd.Function):
    """q, k [B, T, G, K], v [B, T, H, V], state [B, H, K, V], and the decays of `Decays` (batch or n may be 1)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor,
        total: Tensor,
        entering: Tensor,
        leaving: Tensor,
        across: Tensor,
        label: Tensor | None,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _chunks(q, size), _chunks(k, size), v.contiguous()
        scores = q @ k.mT
        weights = _decayed(scores, total, label, v.shape[2])
        x, left = _packed(v, leaving, size, q.shape[2])
        before, after = _forwards(k.mT @ left, across, state)
        carried = q @ before
        y = _summed(weights @ x, carried, entering, v.shape)
        ctx.save_for_backward(q, k, v, scores, before, carried, total, entering, leaving, across, label)
        ctx.size = size
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, scores, before, carried, total, entering, leaving, across, label = ctx.saved_tensors
        for_y, for_after = (g.contiguous() for g in grads)
        decayed = ctx.needs_input_grad[4]
        x, left = _packed(v, leaving, ctx.size, q.shape[2])
        out, through, for_entering = _unsummed(for_y, carried, entering, ctx.size, q.shape[2])
        weights, for_scores, for_total = _undecayed(out @ x.mT, scores, total, label, decayed)
        for_before = q.mT @ through
        for_fed, for_state, for_across = _backwards(for_before, before, across, for_after)
        for_left = k @ for_fed
        for_q = _sum_of_products(for_scores, k, through, before.mT)
        for_k = _sum_of_products(for_scores.mT, q, left, for_fed.mT)
        for_v, for_leaving = _unpacked(weights.mT @ out, for_left, x, leaving, v.shape)
        for_decays = (for_total, for_entering, for_leaving, for_across) if decayed else (None,) * 4
        return _tokens(for_q), _tokens(for_k), for_v, for_state, *for_decays, None, None


def _sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """a b + c d, of [B, n, G, ...] each."""
    total = torch.bmm(a.flatten(0, 2), b.flatten(0, 2))
    total.baddbmm_(c.flatten(0, 2), d.flatten(0, 2))
    return total.reshape(*a.shape[:3], *total.shape[1:])


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, G, K] as [B, n, G, C, K]."""
    chunks: Tensor = x.unflatten(1, (-1, size)).transpose(2, 3).contiguous()
    return chunks


def _tokens(x: Tensor) -> Tensor:
    """[B, n, G, C, K] as [B, T, G, K]."""
    return x.transpose(2, 3).flatten(1, 2)


def _decayed(scores: Tensor, total: Tensor, label: Tensor | None, heads: int) -> Tensor:
    """Every head's scores times its decays, [B, n, H, C, C]."""
    B, n, _, C, _ = scores.shape
    weights = scores.new_empty(B, n, heads, C, C)
    spread(_decayed_loop, B * n * heads, *view(scores, total, _labels(label, B, n, C), weights), label is not None)
    return weights


def _packed(v: Tensor, leaving: Tensor, size: int, groups: int) -> tuple[Tensor, Tensor]:
    """v by head [B, n, H, C, V], and times `leaving` by group [B, n, G, C, R V]."""
    B, T, H, V = v.shape
    x, left = v.new_empty(B, T // size, H, size, V), v.new_empty(B, T // size, groups, size, H // groups * V)
    spread(_packed_loop, B * T // size, *view(v, leaving, x, left))
    return x, left


def _forwards(fed: Tensor, across: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, [B, n, G, K, R V], and the one after the last, [B, H, K, V]."""
    before, after = torch.empty_like(fed), torch.empty_like(state, memory_format=torch.contiguous_format)
    spread(_forwards_loop, state.shape[:2].numel(), *view(fed, across, state.contiguous(), before, after))
    return before, after


def _summed(inner: Tensor, carried: Tensor, entering: Tensor, shape: torch.Size) -> Tensor:
    """y [B, T, H, V]."""
    y = inner.new_empty(shape)
    spread(_summed_loop, inner.shape[:2].numel(), *view(inner, carried, entering, y))
    return y


def _unsummed(
    for_y: Tensor, carried: Tensor, entering: Tensor, size: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of y by head, that of what was carried by group, and that of `entering`."""
    B, T, H, V = for_y.shape
    out, through = for_y.new_empty(B, T // size, H, size, V), torch.empty_like(carried)
    for_entering = for_y.new_empty(B, T // size, H, size)
    spread(_unsummed_loop, B * T // size, *view(for_y, carried, entering, out, through, for_entering))
    return out, through, for_entering.sum_to_size(entering.shape)


def _undecayed(
    for_weights: Tensor, scores: Tensor, total: Tensor, label: Tensor | None, decayed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights again, and the gradients of scores and total."""
    B, n, H, C, _ = for_weights.shape
    weights, for_scores = torch.empty_like(for_weights), torch.empty_like(scores)
    for_total = torch.zeros(B, n, H, C, dtype=torch.float64)
    arrays = view(for_weights, scores, total, _labels(label, B, n, C), weights, for_scores, for_total)
    spread(_undecayed_loop, B * n * scores.shape[2], *arrays, label is not None, decayed)
    return weights, for_scores, for_total.sum_to_size(total.shape)


def _backwards(for_before: Tensor, before: Tensor, across: Tensor, for_after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what each chunk fed, of the state before all, and of `across`."""
    B, n = before.shape[:2]
    for_fed, for_state = torch.empty_like(before), torch.empty_like(for_after)
    for_across = before.new_zeros(B, n, for_after.shape[1])
    spread(
        _backwards_loop,
        for_after.shape[:2].numel(),
        *view(for_before, before, across, for_after, for_fed, for_state, for_across),
    )
    return for_fed, for_state, for_across.sum_to_size(across.shape)


def _unpacked(for_x: Tensor, for_left: Tensor, x: Tensor, leaving: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The gradients of v [B, T, H, V] and of `leaving`."""
    for_v, for_leaving = x.new_empty(shape), x.new_empty(x.shape[:4])
    spread(_unpacked_loop, x.shape[:2].numel(), *view(for_x, for_left, x, leaving, for_v, for_leaving))
    return for_v, for_leaving.sum_to_size(leaving.shape)


def _labels(label: Tensor | None, B: int, n: int, C: int) -> Tensor:
    return torch.zeros(1, 1, 1, dtype=torch.int64) if label is None else label


@compiled
def _decayed_loop(begin: Any, end: Any, scores: Any, total: Any, label: Any, weights: Any, labelled: Any) -> None:
    _, n, H, C, _ = weights.shape
    R = H // scores.shape[2]
    for at in range(begin, end):
        b, i, h = at // (n * H), at // H % n, at % H
        sums, own = total[b % total.shape[0], i % total.shape[1], h], scores[b, i, h // R]
        to = weights[b, i, h]
        for t in range(C):
            for s in range(t + 1):
                to[t, s] = own[t, s] * exp(to.dtype.type(sums[t] - sums[s]))
            for s in range(t + 1, C):
                to[t, s] = 0
            if labelled:
                for s in range(t + 1):
                    if label[b, i, t] != label[b, i, s]:
                        to[t, s] = 0


@compiled
def _undecayed_loop(
    begin: Any, end: Any, given: Any, scores: Any, total: Any, label: Any, weights: Any, for_scores: Any,
    for_total: Any, labelled: Any, decayed: Any,
) -> None:  # fmt: skip
    _, n, H, C, _ = weights.shape
    G = scores.shape[2]
    R = H // G
    for at in range(begin, end):
        b, i, g = at // (n * G), at // G % n, at % G
        own, to = scores[b, i, g], for_scores[b, i, g]
        to[:] = 0
        for h in range(g * R, (g + 1) * R):
            sums, grads, again = total[b % total.shape[0], i % total.shape[1], h], given[b, i, h], weights[b, i, h]
            for t in range(C):
                for s in range(t + 1):
                    again[t, s] = exp(again.dtype.type(sums[t] - sums[s]))
                for s in range(t + 1, C):
                    again[t, s] = 0
                if labelled:
                    for s in range(t + 1):
                        if label[b, i, t] != label[b, i, s]:
                            again[t, s] = 0
                for s in range(t + 1):
                    grads[t, s] *= again[t, s]
                    to[t, s] += grads[t, s]
                    again[t, s] *= own[t, s]
            if decayed:
                _pairs(grads, own, for_total[b, i, h])


@compiled
def _pairs(grads: Any, scores: Any, for_total: Any) -> None:
    """What each pair of different tokens adds to the later one's sum and takes from the earlier one's."""
    C = grads.shape[0]
    for t in range(1, C):
        row = 0.0
        for s in range(t):
            pair = np.float64(grads[t, s] * scores[t, s])
            row += pair
            for_total[s] -= pair
        for_total[t] += row


@compiled
def _packed_loop(begin: Any, end: Any, v: Any, leaving: Any, x: Any, left: Any) -> None:
    _, n, H, C, V = x.shape
    R = H // left.shape[2]
    for at in range(begin, end):
        b, i = at // n, at % n
        for h in range(H):
            by, first = leaving[b % leaving.shape[0], i % leaving.shape[1], h], h % R * V
            for c in range(C):
                value, to, fed = v[b, i * C + c, h], x[b, i, h, c], left[b, i, h // R, c, first : first + V]
                for e in range(V):
                    to[e] = value[e]
                    fed[e] = value[e] * by[c]


@compiled
def _unpacked_loop(
    begin: Any, end: Any, for_x: Any, for_left: Any, x: Any, leaving: Any, for_v: Any, for_leaving: Any
) -> None:
    _, n, H, C, V = x.shape
    R = H // for_left.shape[2]
    for at in range(begin, end):
        b, i = at // n, at % n
        for h in range(H):
            by, first = leaving[b % leaving.shape[0], i % leaving.shape[1], h], h % R * V
            for c in range(C):
                total = for_x.dtype.type(0)
                grad, fed, to = for_left[b, i, h // R, c, first : first + V], x[b, i, h, c], for_v[b, i * C + c, h]
                inner = for_x[b, i, h, c]
                for e in range(V):
                    total += grad[e] * fed[e]
                    to[e] = inner[e] + grad[e] * by[c]
                for_leaving[b, i, h, c] = total


@compiled
def _summed_loop(begin: Any, end: Any, inner: Any, carried: Any, entering: Any, y: Any) -> None:
    _, n, H, C, V = inner.shape
    R = H // carried.shape[2]
    for at in range(begin, end):
        b, i = at // n, at % n
        for h in range(H):
            by, first = entering[b % entering.shape[0], i % entering.shape[1], h], h % R * V
            for c in range(C):
                to, own, more = y[b, i * C + c, h], inner[b, i, h, c], carried[b, i, h // R, c, first : first + V]
                for e in range(V):
                    to[e] = own[e] + more[e] * by[c]


@compiled
def _unsummed_loop(
    begin: Any, end: Any, for_y: Any, carried: Any, entering: Any, out: Any, through: Any, for_entering: Any
) -> None:
    _, n, H, C, V = out.shape
    R = H // carried.shape[2]
    for at in range(begin, end):
        b, i = at // n, at % n
        for h in range(H):
            by, first = entering[b % entering.shape[0], i % entering.shape[1], h], h % R * V
            for c in range(C):
                total = for_y.dtype.type(0)
                grad, to, again = for_y[b, i * C + c, h], out[b, i, h, c], carried[b, i, h // R, c, first : first + V]
                scaled = through[b, i, h // R, c, first : first + V]
                for e in range(V):
                    to[e] = grad[e]
                    scaled[e] = grad[e] * by[c]
                    total += grad[e] * again[e]
                for_entering[b, i, h, c] = total


@compiled
def _forwards_loop(begin: Any, end: Any, fed: Any, across: Any, state: Any, before: Any, after: Any) -> None:
    _, n, G, K, _ = fed.shape
    H, V = state.shape[1], state.shape[3]
    R = H // G
    for at in range(begin, end):
        b, h = at // H, at % H
        g, first = h // R, h % R * V
        after[b, h] = state[b, h]
        for i in range(n):
            by = across[b % across.shape[0], i % across.shape[1], h]
            for k in range(K):
                held, to, more = (
                    after[b, h, k],
                    before[b, i, g, k, first : first + V],
                    fed[b, i, g, k, first : first + V],
                )
                for e in range(V):
                    to[e] = held[e]
                    held[e] = held[e] * by + more[e]


@compiled
def _backwards_loop(
    begin: Any,
    end: Any,
    for_before: Any,
    before: Any,
    across: Any,
    for_after: Any,
    for_fed: Any,
    for_state: Any,
    for_across: Any,
) -> None:
    _, n, G, K, _ = before.shape
    H, V = for_after.shape[1], for_after.shape[3]
    R = H // G
    for at in range(begin, end):
        b, h = at // H, at % H
        g, first = h // R, h % R * V
        for_state[b, h] = for_after[b, h]
        for back in range(n):
            i = n - 1 - back
            by, total = across[b % across.shape[0], i % across.shape[1], h], before.dtype.type(0)
            for k in range(K):
                grad, to, was = (
                    for_state[b, h, k],
                    for_fed[b, i, g, k, first : first + V],
                    before[b, i, g, k, first : first + V],
                )
                more = for_before[b, i, g, k, first : first + V]
                for e in range(V):
                    to[e] = grad[e]
                    total += grad[e] * was[e]
                    grad[e] = grad[e] * by + more[e]
            for_across[b, i, h] = total


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), on_cpu)
