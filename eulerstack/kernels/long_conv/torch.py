"""The long convolution by PyTorch's FFT, each document in a row of its own; one token is a plain sum.

The caller writes the history; what `chunkwise` and `recurrent` are given is the one before and after that.
"""

import torch
from torch import Tensor

from ...segments import Segments
from ..open_length import is_open
from ..precision import wide, without_autocast
from ..provider import Forms, Provider, anywhere


@without_autocast
def parallel(x: Tensor, taps: Tensor, segments: Segments) -> Tensor:
    """A whole sequence without an earlier state. Returns y [B, T, D], at least float32."""
    x = x.to(wide(x.dtype))
    if segments.plain:
        return _filtered(x, taps)
    return _by_document(x, taps, None, segments)


@without_autocast
def chunkwise(x: Tensor, taps: Tensor, history: Tensor, segments: Segments) -> Tensor:
    """T tokens after the `history` [B, S, D] that does not hold them yet. Returns y [B, T, D], at least float32."""
    x = x.to(wide(x.dtype))
    return _by_document(x, taps, history.to(x.dtype), segments)


@without_autocast
def recurrent(x: Tensor, taps: Tensor, history: Tensor, segments: Segments) -> Tensor:
    """One token (T = 1), which the `history` [B, S, D] already holds. Returns y [B, 1, D], at least float32."""
    assert segments.position is not None
    dtype, used = wide(x.dtype), min(history.shape[1], taps.shape[0])
    back = segments.position - torch.arange(used, device=x.device)  # [B or 1, used]
    seen = taps.to(dtype)[back.clamp(min=0)] * (back >= 0)[..., None]
    y: Tensor = (seen * history[:, :used].to(dtype)).sum(1, keepdim=True)
    return segments.mask(y)


def _by_document(x: Tensor, taps: Tensor, history: Tensor | None, segments: Segments) -> Tensor:
    """The documents unpacked into rows [N, P, D] behind their histories, filtered, and packed again."""
    B, T, D = x.shape
    found = segments.documents(B)
    if found.place.numel() == 0:
        return torch.zeros_like(x)
    counts = found.bounds.diff()
    start = torch.zeros_like(counts)
    if history is not None:
        start = torch.where(found.incoming, segments.before(B)[found.row], 0)
    longest = int((start + counts).max())
    document = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    offset = torch.arange(len(document), device=x.device) - found.bounds[document]
    rows = x.new_zeros(len(counts), longest, D)
    if history is not None:
        held = torch.arange(longest, device=x.device) < start[:, None]
        rows = torch.where(held[..., None], history[found.row, :longest], rows)
    at = (document, start[document] + offset)
    y = _filtered(rows.index_put(at, found.packed(x)), taps)
    return found.spread(y[at], B, T)


def _filtered(rows: Tensor, taps: Tensor) -> Tensor:
    """[N, P, D]: twice as long a transform, so that nothing wraps around."""
    tokens = rows.shape[1]
    if is_open(tokens):
        return _open_filtered(rows, taps)
    size = max(2 * tokens, 2)
    spectrum = torch.fft.rfft(rows, size, dim=1) * torch.fft.rfft(taps[:tokens].to(rows.dtype), size, dim=0)
    y: Tensor = torch.fft.irfft(spectrum, size, dim=1)
    return y[:, :tokens]


def _open_filtered(rows: Tensor, taps: Tensor) -> Tensor:
    """A length that is not known yet, which stands last so that nothing depends on how wide the rows are."""
    tokens = rows.shape[1]
    rows, taps = rows.transpose(1, 2).contiguous(), taps[:tokens].to(rows.dtype).T.contiguous()
    spectrum = torch.fft.rfft(rows, 2 * tokens) * torch.fft.rfft(taps, 2 * tokens)
    y: Tensor = torch.fft.irfft(spectrum, 2 * tokens)
    return y[..., :tokens].transpose(1, 2)


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), anywhere)
