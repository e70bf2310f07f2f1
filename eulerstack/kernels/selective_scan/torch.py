"""The selective scan in PyTorch: the definition of the operation (Gu and Dao 2023, arXiv 2312.00752), in three forms.

Everything is computed in at least float32, token by token or by a prefix scan; each keeps [B, T, D, N] for gradients.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...segments import Segments
from ..open_length import delay, is_open, reaches
from ..precision import wide, without_autocast
from ..provider import Forms, Provider, anywhere


@without_autocast
def parallel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments) -> Tensor:
    """A prefix scan of log2(T) steps over a whole sequence, without an earlier state. Returns y [B, T, D], wide."""
    _, states = _scan(*_terms(x, dt, A, B, segments, wide(x.dtype)))
    return segments.mask(_read(states, C))


def _scan(decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The products of the decays up to each token, and the states after it from none before, [B, T, D, N] both."""
    for reach in reaches(state.shape[1]):  # tokens that `state` sums up, and over which `decay` has multiplied
        state = torch.addcmul(state, decay, delay(state, reach))
        decay = decay * delay(decay, reach, 1.0)
    return decay, state


@without_autocast
def chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state`, one by one; [B, T, D, N] is made for `chunk_size` tokens at a time.

    A length that is not known yet takes a prefix scan. Returns y [B, T, D], at least float32, and the state after the
    last real token.
    """
    if is_open(x.shape[1]):
        decay, own = _scan(*_terms(x, dt, A, B, segments, state.dtype))
        after = torch.addcmul(own, decay, state[:, None])
        return segments.mask(_read(after, C)), after[:, -1]
    outs = [x[:, :0].to(state.dtype)]
    for start in range(0, x.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        where, states = segments.slice(start, min(start + chunk_size, x.shape[1])), []
        decay, fed = _terms(x[:, part], dt[:, part], A, B[:, part], where, state.dtype)
        for kept, more in zip(decay.unbind(1), fed.unbind(1), strict=True):
            state = torch.addcmul(more, kept, state)
            states.append(state)
        outs.append(_read(torch.stack(states, 1), C[:, part]))
    return segments.mask(torch.cat(outs, 1)), state


@without_autocast
def recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """One token (T = 1) that continues `state`. Returns y [B, 1, D] and the state after it."""
    decay, fed = _terms(x, dt, A, B, segments, state.dtype)
    state = torch.addcmul(fed[:, 0], decay[:, 0], state)
    return segments.mask(_read(state[:, None], C)), state


def _terms(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, segments: Segments, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What each token multiplies the state with, and what it adds: [B, T, D, N] both.

    A padding token leaves the state as it is, a document's first token forgets it.
    """
    dt = segments.mask(dt.to(dtype))
    decay = (dt[..., None] * A.to(dtype)).exp()
    if not segments.plain:
        decay = decay.masked_fill(opens(segments)[..., None, None], 0)
    return decay, (dt * x.to(dtype))[..., None] * B.to(dtype)[:, :, None]


def opens(segments: Segments) -> Tensor:
    """[B, T] bool: the token is the first of a document that does not continue the state before it."""
    before = pad(segments.running, (1, 0))[:, :-1]
    return (segments.label >= 0) & (segments.label != before)


def _read(state: Tensor, C: Tensor) -> Tensor:
    """y [B, T, D] of states [B, T, D, N]."""
    return (state @ C.to(state.dtype)[..., None])[..., 0]


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), anywhere)
