"""Retention by flash-linear-attention's Triton kernels (`simple_gla`): documents are sequences of a packed batch.

They choose their own chunk (64 tokens at most). A call's real tokens are packed, so that padding costs nothing.
"""

from typing import Any

import torch
from fla.ops.simple_gla import chunk_simple_gla
from torch import Tensor

from ...segments import Segments
from ..precision import wide, without_autocast
from ..provider import Forms, Provider, Target, on_triton
from .torch import recurrent


@without_autocast
def parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Segments) -> Tensor:
    """A whole sequence without an earlier state. Returns y [B, T, H, V], at least float32."""
    state = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=wide(v.dtype))
    return _packed(q, k, v, log_decay, state, segments)[0]


@without_autocast
def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state`. Returns y [B, T, H, V], at least float32, and the state after them."""
    return _packed(q, k, v, log_decay, state, segments)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Every document from its own state; a row's state becomes that of its last document."""
    B, T, H = v.shape[:3]
    found = segments.documents(B)
    if found.place.numel() == 0:
        return torch.zeros_like(v, dtype=state.dtype), state
    q, k = (t.repeat_interleave(H // t.shape[2], 2).to(v.dtype) for t in (q, k))
    g = log_decay.expand(B, T, H).to(torch.float32)
    inputs = (found.packed(t)[None] for t in (q, k, v, g))
    opening = torch.where(found.incoming[:, None, None, None], state[found.row], 0).contiguous()
    y, after = chunk_simple_gla(
        *inputs, scale=1.0, initial_state=opening, output_final_state=True, cu_seqlens=found.bounds
    )
    kept = (found.last < 0)[:, None, None, None]
    return found.spread(y[0].to(state.dtype), B, T), torch.where(kept, state, after[found.last].to(state.dtype))


def refuses(target: Target, *, head_dim: int = 2, value_dim: int = 2, **needs: Any) -> str | None:
    """Triton's answer, and that of its products."""
    if (head_dim % 2 or value_dim % 2) and target.dtype in (torch.float16, torch.bfloat16):
        return f"takes heads of an even number of channels in 16 bits, not {head_dim} and {value_dim}"
    return on_triton(target)


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), refuses)
