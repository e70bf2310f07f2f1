"""A step of retention on a GPU by Triton: the state is read once and written where it lies.

A decode's state is most of what it moves (Sun et al. 2023, arXiv 2307.08621, keep K x V numbers a head), so that every
further pass over it costs as much as the step. Sequences are PyTorch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...segments import Segments
from ..precision import without_autocast
from ..provider import Forms, Provider, on_triton
from . import torch as reference

KEYS, VALUES = 32, 64  # of a tile of the state


@without_autocast
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Equation 6, one token (T = 1): y [B, 1, H, V] and `state`, written in place. PyTorch's under gradients."""
    if torch.is_grad_enabled() or state.numel() == 0 or state.dtype != torch.float32:
        return reference.recurrent(q, k, v, log_decay, state, segments)
    (B, H, K, V), G = state.shape, q.shape[2]
    decay = reference.decay_of_one(log_decay, state.dtype, segments).expand(B, H).contiguous()
    q, k, fed = (t.contiguous() for t in (q, k, segments.mask(v)))
    y, state = state.new_empty(B, 1, H, V), state.contiguous()
    keys, values = min(KEYS, triton.next_power_of_2(K)), min(VALUES, triton.next_power_of_2(V))
    _step[(B * H, triton.cdiv(V, values))](q, k, fed, decay, state, y, H, H // G, K, V, keys, values)
    return segments.mask(y), state


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    q, k, v, decay, state, y, H, shared,
    K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One head of one row, and VALUES channels of its values; `shared` heads have one query and key."""
    head, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    query, inside = head // H * (H // shared) + head % H // shared, column < V
    fed = tl.load(v + head * V + column, mask=inside, other=0.0).to(tl.float32)
    kept, total = tl.load(decay + head), tl.zeros([VALUES], tl.float32)
    for start in tl.static_range(0, K, KEYS):
        row = start + tl.arange(0, KEYS)
        there, place = row < K, (head * K + row[:, None]) * V + column[None, :]
        both = there[:, None] & inside[None, :]
        key = tl.load(k + query * K + row, mask=there, other=0.0).to(tl.float32)
        asked = tl.load(q + query * K + row, mask=there, other=0.0).to(tl.float32)
        now = tl.load(state + place, mask=both, other=0.0) * kept + key[:, None] * fed[None, :]
        tl.store(state + place, now, mask=both)
        total += tl.sum(asked[:, None] * now, 0)
    tl.store(y + head * V + column, total, mask=inside)


PROVIDER = Provider(Forms(reference.parallel, reference.chunkwise, recurrent), on_triton)
