"""Attention of a step on a CPU: one query a row over its cache, in loops that Numba compiles.

A cache is [B, S, Hkv, K]: all heads of a token lie together, and are read together, at the memory's rate. PyTorch's
kernel takes one head after the other, and on 16 rows of 12 heads it is three to four times slower.
"""

from typing import Any

import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from ..compiled import compiled, exp, on_openmp, openmp_refuses, readable, shared, this_share
from ..provider import Provider
from . import Attending, Logits
from . import torch as reference

GRAIN = 1 << 15  # products that are worth one more thread


def cached(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, distance: Tensor | None, logits: Logits, drop: float = 0.0
) -> Tensor:
    """PyTorch's; one query of float32 a row, [B, 1, H, K], with plain logits, by the loops below."""
    plain = logits.plain and not drop
    if not plain or not readable(q, k, v) or not _fits(q, k, v) or not (_together(k) and _together(v)):
        return reference.cached(q, k, v, visible, distance, logits, drop)
    (B, S, G, K), H, V = k.shape, q.shape[2], v.shape[3]
    q, seen = q.contiguous(), visible.expand(B, 1, S).contiguous()
    y, scale = q.new_empty(B, 1, H, V), torch.tensor(logits.scale, dtype=torch.float32)
    sizes = (B, S, H, G, K, V, k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    threads = min(torch.get_num_threads(), 1 + B * S * H * (K + V) // GRAIN)
    on_openmp(shared(_all_rows), (q, k, v, seen, scale, y), sizes, threads)
    return y


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the shapes are the loops', which do not look at them again."""
    B, S, G, K = k.shape
    alike = q.shape == (B, 1, q.shape[2], K) and v.shape == (B, S, G, v.shape[3])
    return alike and k.numel() > 0 and q.shape[2] % G == 0


def _together(cache: Tensor) -> bool:
    """Whether the heads of a token lie side by side."""
    return cache.stride(3) == 1 and (cache.shape[2] == 1 or cache.stride(2) == cache.shape[3])


def _all_rows(pointers: Any) -> None:
    sizes: Any = carray(pointers[0], 10, np.int64)
    B, S, H, G, K, V, k_row, k_token, v_row, v_token = sizes
    q, y = carray(pointers[1], (B, H, K), np.float32), carray(pointers[6], (B, H, V), np.float32)
    keys: Any = carray(pointers[2], (B - 1) * k_row + (S - 1) * k_token + G * K, np.float32)
    values: Any = carray(pointers[3], (B - 1) * v_row + (S - 1) * v_token + G * V, np.float32)
    seen, scale = carray(pointers[4], (B, S), np.uint8), carray(pointers[5], 1, np.float32)
    begin, end = this_share(B * G)  # of all, whatever is seen: a recording may be run for any number of slots
    while begin < end:
        b, first = begin // G, begin % G
        last = min(G, first + end - begin)
        weights = np.empty(((last - first) * (H // G), _used(seen[b])), np.float32)
        _weigh(q[b], keys[b * k_row :], k_token, seen[b], scale[0], weights, first, last)
        _sum(weights, values[b * v_row :], v_token, y[b], first, last)
        begin += last - first


@compiled
def _used(seen: Any) -> Any:
    """How many slots there are up to the last that is seen; sums do not depend on how many follow."""
    used = seen.shape[0]
    while used > 0 and not seen[used - 1]:
        used -= 1
    return used


@compiled
def _weigh(q: Any, keys: Any, step: Any, seen: Any, scale: Any, weights: Any, first: Any, last: Any) -> None:
    """The softmax of the heads that share kv heads first .. last - 1, weights [heads, S]; zeros if nothing is seen."""
    K, shared_by, none = q.shape[1], weights.shape[0] // (last - first), weights.dtype.type(-np.inf)
    for s in range(weights.shape[1]):
        for g in range(first, last):
            key = keys[s * step + g * K : s * step + (g + 1) * K]
            for h in range((g - first) * shared_by, (g - first + 1) * shared_by):
                query, total = q[first * shared_by + h], weights.dtype.type(0)
                for i in range(K):
                    total += query[i] * key[i]
                weights[h, s] = total * scale if seen[s] else none
    for h in range(weights.shape[0]):
        row = weights[h]
        top, total = none, weights.dtype.type(0)
        for s in range(row.shape[0]):
            top = max(top, row[s])
        top = weights.dtype.type(0) if top == none else top
        for s in range(row.shape[0]):
            row[s] = exp(row[s] - top)
            total += row[s]
        total = weights.dtype.type(1) / total if total > 0 else total
        for s in range(row.shape[0]):
            row[s] *= total


@compiled
def _sum(weights: Any, values: Any, step: Any, y: Any, first: Any, last: Any) -> None:
    V, shared_by = y.shape[1], weights.shape[0] // (last - first)
    y[first * shared_by : last * shared_by] = 0
    for s in range(weights.shape[1]):
        for g in range(first, last):
            value = values[s * step + g * V : s * step + (g + 1) * V]
            for h in range((g - first) * shared_by, (g - first + 1) * shared_by):
                weight, out = weights[h, s], y[first * shared_by + h]
                for i in range(V):
                    out[i] += weight * value[i]


PROVIDER = Provider(Attending(reference.whole, cached, reference.continued), openmp_refuses)
