"""One token of retention in a loop that Numba compiles: the state passes through memory once.

A state [B, H, K, V] in memory as [B, H, V, K], which is a state space's own layout, is read as it lies.
"""

from typing import Any

import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from ...segments import Segments
from ..compiled import compiled, on_openmp, openmp, readable, shared, this_share
from ..precision import without_autocast
from . import torch as reference

GRAIN = 1 << 15  # numbers of state that are worth one more thread


@without_autocast
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Equation 6; PyTorch's where a gradient is wanted, or numbers are not float32 on a CPU."""
    tensors = (q, k, v, log_decay, state)
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if grads or not readable(state, v) or not _fits(q, k, v, log_decay, state) or openmp() is None:
        return reference.recurrent(*tensors, segments)
    q, k, fed = (t[:, 0].to(state.dtype).contiguous() for t in (q, k, segments.mask(v)))
    decay = reference.decay_of_one(log_decay, state.dtype, segments).contiguous()
    y, after = _stepped(q, k, fed, decay, state)
    return segments.mask(y[:, None]), after


def _fits(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> bool:
    """Whether the shapes are the loop's, which does not look at them again."""
    B, H, K, V = state.shape
    of_keys = q.shape == k.shape == (B, 1, q.shape[2], K) and H % q.shape[2] == 0
    return of_keys and v.shape == (B, 1, H, V) and log_decay.shape in ((H,), (B, 1, H)) and state.numel() > 0


def _stepped(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, G, K], v [B, H, V], decay [B or 1, H], state [B, H, K, V]; all but the state contiguous.

    The state is written where it is, but under grad, where a graph may hold it.
    """
    turned = not state.is_contiguous() and state.mT.is_contiguous()
    state = state if turned else state.contiguous()
    state, y = state.clone() if torch.is_grad_enabled() else state, torch.empty_like(v)
    sizes = (*state.shape, q.shape[1], decay.shape[0], turned)
    threads = min(torch.get_num_threads(), 1 + state.numel() // GRAIN)
    on_openmp(shared(_all_heads), (q, k, v, decay, state, y), sizes, threads)
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return y, state


def _all_heads(pointers: Any) -> None:
    sizes: Any = carray(pointers[0], 7, np.int64)
    B, H, K, V, G, rows, turned = sizes
    q, k = carray(pointers[1], (B, G, K), np.float32), carray(pointers[2], (B, G, K), np.float32)
    v, decay = carray(pointers[3], (B, H, V), np.float32), carray(pointers[4], (rows, H), np.float32)
    y = carray(pointers[6], (B, H, V), np.float32)
    state = carray(pointers[5], (B * H, V, K) if turned else (B * H, K, V), np.float32)
    begin, end = this_share(B * H)
    for place in range(begin, end):
        b, h = place // H, place % H
        g, kept = h // (H // G), decay[b % rows, h]
        if turned:
            _by_value(q[b, g], k[b, g], v[b, h], kept, state[place], y[b, h])
        else:
            _by_key(q[b, g], k[b, g], v[b, h], kept, state[place], y[b, h])


@compiled
def _by_key(q: Any, k: Any, v: Any, decay: Any, state: Any, y: Any) -> None:
    """state [K, V]"""
    for j in range(v.shape[0]):
        y[j] = y.dtype.type(0)
    for i in range(k.shape[0]):
        row, key, query = state[i], k[i], q[i]
        for j in range(v.shape[0]):
            row[j] = row[j] * decay + key * v[j]
            y[j] += query * row[j]


@compiled
def _by_value(q: Any, k: Any, v: Any, decay: Any, state: Any, y: Any) -> None:
    """state [V, K]"""
    for j in range(v.shape[0]):
        row, value, out = state[j], v[j], y.dtype.type(0)
        for i in range(k.shape[0]):
            row[i] = row[i] * decay + value * k[i]
            out += q[i] * row[i]
        y[j] = out
