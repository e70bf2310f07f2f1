"""RWKV-4's operator in PyTorch (Peng et al. 2023, arXiv 2305.13048).

Exponents are float64 and leave it only as differences from their largest, so that keys of any size are safe. The
result does not depend on which number is subtracted, so no gradient goes through a maximum.
"""

import torch
from torch import Tensor

from ...segments import Segments
from ..open_length import delay, is_open, reaches
from ..precision import wide, without_autocast
from ..provider import Forms, Provider, anywhere

State = tuple[Tensor, Tensor, Tensor]

NOTHING = -1e300  # the exponent of what is not there


@without_autocast
def parallel(k: Tensor, v: Tensor, w: Tensor, u: Tensor, segments: Segments) -> Tensor:
    """A whole sequence without an earlier state, by a scan of logarithmic depth. Returns y [B, T, D], wide."""
    k64, v = k.double(), v.to(wide(v.dtype))
    return segments.mask(_with_bonus(k64, v, u.double(), *_scan(k64, v, w.double(), segments)))


def _scan(k: Tensor, v: Tensor, w: Tensor, segments: Segments) -> State:
    """The sums over the tokens of a document before each, [B, T, D]."""
    label = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device) if segments.plain else segments.label
    top = k.detach()
    weight = (k - top).exp().to(v.dtype)  # one, with k's gradient
    total = weight * v
    for step in reaches(k.shape[1]):
        total, weight, top = _joined(total, weight, top, w, label, step)
    total, weight = (_shifted(t, label, 1, 0.0) for t in (total, weight))
    return total, weight, _shifted(top, label, 1, NOTHING)


def _joined(total: Tensor, weight: Tensor, top: Tensor, w: Tensor, label: Tensor, step: int) -> State:
    """Sums over the last 2 `step` tokens of a document, from those over the last `step`."""
    gone = step * w
    earlier = _shifted(top, label, step, NOTHING) - gone
    new = torch.maximum(top, earlier.detach())
    keep, add = (top - new).exp().to(total.dtype), (earlier - new).exp().to(total.dtype)
    total, weight = (t * keep + _shifted(t, label, step, 0.0) * add for t in (total, weight))
    return total, weight, new


def _shifted(x: Tensor, label: Tensor, step: int, nothing: float) -> Tensor:
    """x of `step` tokens before, `nothing` where that is another document."""
    same = delay(label, step, -2) == label
    return torch.where(same[..., None], delay(x, step), nothing)


def _with_bonus(k: Tensor, v: Tensor, u: Tensor, total: Tensor, weight: Tensor, top: Tensor) -> Tensor:
    """The mean of what came before and of the token itself."""
    own = u + k
    most = torch.maximum(own, top).detach()
    keep, add = (top - most).exp().to(v.dtype), (own - most).exp().to(v.dtype)
    return (total * keep + v * add) / (weight * keep + add)


@without_autocast
def recurrent(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State, segments: Segments) -> tuple[Tensor, State]:
    """One token (T = 1) that continues `state`. Returns y [B, 1, D] and the state after it."""
    total, weight, _ = state
    k64, now, top = k[:, 0].double(), v[:, 0].to(total.dtype), _known(state)
    if not segments.plain:
        fresh = segments.running != 0
        total, weight = (torch.where(fresh, 0, t) for t in (total, weight))
        top = torch.where(fresh, NOTHING, top)
    y = _with_bonus(k64, now, u.double(), total, weight, top)
    earlier = top - w.double()
    most = torch.maximum(earlier, k64).detach()
    keep, add = (earlier - most).exp().to(total.dtype), (k64 - most).exp().to(total.dtype)
    after = (total * keep + now * add, weight * keep + add, most.to(total.dtype))
    return segments.mask(y[:, None]), after if segments.real is None else _where(segments.real, after, state)


def _known(state: State) -> Tensor:
    """The state's top as an exponent, NOTHING where it has summed nothing."""
    return torch.where(state[1] > 0, state[2].double(), NOTHING)


@without_autocast
def chunkwise(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State, segments: Segments, chunk_size: int
) -> tuple[Tensor, State]:
    """T tokens that continue `state`, every pair in a chunk of `chunk_size` at once.

    A length that is not known yet takes a scan. Returns y [B, T, D], at least float32, and the state after the last
    real token.
    """
    if is_open(k.shape[1]):
        return _open_chunk(k.double(), v.to(state[0].dtype), w.double(), u.double(), state, segments)
    parts, v = [], v.to(state[0].dtype)
    for start in range(0, k.shape[1], chunk_size):
        stop = min(start + chunk_size, k.shape[1])
        where = segments.slice(start, stop)
        y, state = _chunk(k[:, start:stop].double(), v[:, start:stop], w.double(), u.double(), state, where)
        parts.append(y)
    return torch.cat(parts, 1) if parts else v, state


def _open_chunk(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State, segments: Segments) -> tuple[Tensor, State]:
    """One chunk of a length that is not known yet: [B, T, D] and no pairs."""
    total, weight, top = _scan(k, v, w, segments)
    held = _known(state)[:, None] - _since(segments, k.shape[0])[..., None] * w
    if not segments.plain:
        held = held.masked_fill((segments.label != 0)[..., None], NOTHING)
    most = torch.maximum(top, held).detach()
    keep, add = (top - most).exp().to(v.dtype), (held - most).exp().to(v.dtype)
    before = total * keep + state[0][:, None] * add, weight * keep + state[1][:, None] * add, most
    return segments.mask(_with_bonus(k, v, u, *before)), _after(k, v, w, state, segments)


def _chunk(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State, segments: Segments) -> tuple[Tensor, State]:
    """One chunk of C tokens: exponents [B, C, C, D] of each token at each later one."""
    tokens = k.shape[1]
    index = torch.arange(tokens, device=k.device)
    behind = (index[:, None] - 1 - index)[..., None]
    own = (behind == -1).double()
    exponent = k[:, None] - behind.clamp(min=0) * w + own * u
    exponent = exponent.masked_fill(~segments.among()[..., None], NOTHING)
    held = _known(state)[:, None] - _since(segments, k.shape[0])[..., None] * w
    if not segments.plain:
        held = held.masked_fill((segments.label != 0)[..., None], NOTHING)
    total, weight = _sums(exponent, held, v[:, None], state)
    y = segments.mask(total / torch.where(weight > 0, weight, 1))
    return y, _after(k, v, w, state, segments)


def _sums(exponent: Tensor, held: Tensor, v: Tensor, state: State, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of values and of weights over the exponents' second last axis and the state, scaled by e^{-top}."""
    if top is None:
        top = torch.maximum(exponent.amax(-2), held).detach()
    weights, kept = (exponent - top[..., None, :]).exp().to(v.dtype), (held - top).exp().to(v.dtype)
    total, weight = (t[:, None] if held.dim() == 3 else t for t in state[:2])
    return (weights * v).sum(-2) + kept * total, weights.sum(-2) + kept * weight


def _after(k: Tensor, v: Tensor, w: Tensor, state: State, segments: Segments) -> State:
    """The state after the chunk: that of each row's last document, as it was where the row is padding."""
    tokens = k.shape[1]
    index = torch.arange(tokens, device=k.device)
    if segments.plain:
        exponent, held = k - (tokens - 1 - index)[:, None] * w, _known(state) - tokens * w
    else:
        last = (segments.first + segments.count - 1)[:, None]
        own = segments.label == segments.running[:, -1:]
        exponent = (k - (last - index).clamp(min=0)[..., None] * w).masked_fill(~own[..., None], NOTHING)
        ended = (segments.running[:, -1:] != 0) & (segments.count > 0)[:, None]
        held = (_known(state) - segments.count[:, None] * w).masked_fill(ended, NOTHING)
    top = torch.maximum(exponent.amax(1), held).detach()
    total, weight = _sums(exponent, held, v, state, top)
    after = (total, weight, top.to(v.dtype))
    return after if segments.plain else _where((segments.count > 0)[:, None], after, state)


def _where(taken: Tensor, after: State, before: State) -> State:
    """The state after, for the rows [B, 1] that have taken in a token."""
    total, weight, top = (torch.where(taken, a, b) for a, b in zip(after, before, strict=True))
    return total, weight, top


def _since(segments: Segments, batch: int) -> Tensor:
    """[B, T] how many tokens of the incoming document lie between the state and each token of it."""
    assert segments.position is not None
    return segments.position - segments.before(batch)[:, None]


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), anywhere)
