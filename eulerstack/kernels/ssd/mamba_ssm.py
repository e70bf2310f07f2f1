"""SSD by mamba-ssm's Triton kernels (`mamba_chunk_scan_combined`), one token by its `selective_state_update`.

Chunks are powers of two from 16 to 256. Where gradients are wanted of a single token it is PyTorch's, for the update
has none.
"""

import torch
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from ...segments import Segments
from ..precision import wide, without_autocast
from ..provider import Forms, Provider, mamba_ssm
from . import torch as reference

CHUNK = 256


@without_autocast
def parallel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments) -> Tensor:
    """A whole sequence without an earlier state. Returns y [B, T, H, P]."""
    state = torch.zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=wide(x.dtype), device=x.device)
    return chunkwise(x, dt, A, B, C, state, segments, CHUNK)[0]


@without_autocast
def chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state`: of documents, only number 0 sees it. Padding has dt = 0. Returns y and state.

    A chunk is the largest power of two in `chunk_size`, between 16 and 256.
    """
    if x.shape[1] == 0:
        return x.to(state.dtype), state
    y, after = mamba_chunk_scan_combined(
        x.contiguous(),
        segments.mask(dt.to(state.dtype)).contiguous(),
        A.to(state.dtype),
        B.to(x.dtype).contiguous(),
        C.to(x.dtype).contiguous(),
        min(max(1 << (chunk_size.bit_length() - 1), 16), CHUNK),
        initial_states=state.contiguous(),
        seq_idx=None if segments.plain else segments.running.to(torch.int32),
        return_final_states=True,
    )
    return y.to(state.dtype), after.to(state.dtype)


@without_autocast
def recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """One token (T = 1) that continues `state`. Returns y [B, 1, H, P] and the state after it."""
    if torch.is_grad_enabled():
        return reference.recurrent(x, dt, A, B, C, state, segments)
    H, P, N = state.shape[1:]
    state = (state * (segments.running == 0)[:, :, None, None]) if not segments.plain else state.clone()
    dt = segments.mask(dt.to(state.dtype))[:, 0, :, None].expand(-1, -1, P)
    A = A.to(state.dtype)[:, None, None].expand(-1, P, N)
    none = dt.new_zeros(()).expand(H, P)  # the update fails without a bias, and is fast where that is one for a head
    y = selective_state_update(state, x[:, 0], dt, A, B[:, 0].contiguous(), C[:, 0].contiguous(), dt_bias=none)
    return segments.mask(y[:, None].to(state.dtype)), state


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), mamba_ssm)
