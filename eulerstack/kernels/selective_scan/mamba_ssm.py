"""The selective scan by mamba-ssm's CUDA kernel, which knows neither an initial state nor documents, nor differentiates
its last state. So each document becomes a row of its own between N tokens that write its state and N that read it.

Token n that writes has B = e_n, a step of 2^-60 and x = 2^60 state[:, n], exact in float32; one that reads has
C = e_n and no step. Where gradients are wanted of a single token it is PyTorch's.
"""

import selective_scan_cuda  # noqa: F401 - the scan itself: without it mamba-ssm imports all the same, and fails in use
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from torch import Tensor

from ...segments import Segments
from ..precision import without_autocast
from ..provider import Forms, Provider, mamba_ssm
from . import torch as reference

TINY = 2.0**-60
"""A step so short that nothing decays in it."""


@without_autocast
def parallel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments) -> Tensor:
    """A whole sequence without an earlier state. Returns y [B, T, D], float32."""
    state = torch.zeros(x.shape[0], *A.shape, dtype=torch.float32, device=x.device)
    return chunkwise(x, dt, A, B, C, state, segments, 1)[0]


@without_autocast
def chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state`. Returns y [B, T, D], float32, and the state after the last real token."""
    rows, tokens, numbers = x.shape[0], x.shape[1], A.shape[1]
    found = segments.documents(rows)
    if found.place.numel() == 0:
        return x.float() * 0, state
    row = torch.repeat_interleave(torch.arange(len(found.row), device=x.device), found.bounds.diff())
    column = torch.arange(len(row), device=x.device) - found.bounds[row] + numbers
    shape = (len(found.row), int(found.bounds.diff().max()) + 2 * numbers)

    def laid(t: Tensor) -> Tensor:
        """[B, T, ...] as a row a document, [documents, N + longest + N, ...], zero elsewhere."""
        flat = found.packed(t.float())
        return flat.new_zeros(*shape, t.shape[2]).index_put((row, column), flat)

    xs, dts, Bs, Cs = laid(x), laid(dt), laid(B), laid(C)
    unit = torch.eye(numbers, device=x.device).expand(shape[0], -1, -1)
    opening = torch.where(found.incoming[:, None, None], state[found.row], 0)
    xs = torch.cat([opening.mT / TINY, xs[:, numbers:]], 1)
    dts = torch.cat([torch.full_like(xs[:, :numbers], TINY), dts[:, numbers:]], 1)
    Bs, Cs = torch.cat([unit, Bs[:, numbers:]], 1), torch.cat([Cs[:, :-numbers], unit], 1)
    inputs = (t.transpose(1, 2).contiguous() for t in (xs, dts))
    out = selective_scan_fn(*inputs, A.float(), *(t.transpose(1, 2).contiguous() for t in (Bs, Cs))).transpose(1, 2)
    after = torch.where((found.last < 0)[:, None, None], state, out[:, -numbers:].mT[found.last])
    return found.spread(out[row, column], rows, tokens), after


@without_autocast
def recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """One token (T = 1) that continues `state`. Returns y [B, 1, D] and the state after it."""
    if torch.is_grad_enabled():
        return reference.recurrent(x, dt, A, B, C, state, segments)
    state = state.clone() if segments.plain else state * (segments.running == 0)[..., None]
    dt = segments.mask(dt.to(state.dtype))[:, 0]
    inputs = (x[:, 0].to(state.dtype), dt, A.to(state.dtype), B[:, 0].float(), C[:, 0].float())
    y = selective_state_update(state, *inputs, dt_bias=torch.zeros_like(dt[0]))  # it fails without a bias
    return segments.mask(y[:, None]), state


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), mamba_ssm)
