"""Retention in PyTorch: the definition of the operation, in the three forms of Sun et al. 2023 (arXiv 2307.08621).

Everything is computed in at least float32. Cumulative log decays are summed in float64 and only their differences
are rounded, so that a decay never depends on how far the sums have run.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...segments import Segments
from ..open_length import is_open
from ..precision import wide, without_autocast
from ..provider import Forms, Kernel, Provider, anywhere
from ..tracing import makes_program


@without_autocast
def parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Segments) -> Tensor:
    """Equation 5, (Q K^T * D) V: a whole sequence without an earlier state. Returns y [B, T, H, V], wide."""
    dtype = wide(v.dtype)
    heads = v.shape[2]
    q, k, x = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    total = _per_token(log_decay, q.shape[2], segments).cumsum(1).transpose(1, 2)
    visible = _causal(v.shape[1], v.device) if segments.plain else segments.together[:, None]
    log = (total[..., :, None] - total[..., None, :]).to(dtype)
    decay = log.masked_fill(~visible, -torch.inf).exp()  # masked first: no gradient meets inf * 0
    scores = (q @ k.mT).repeat_interleave(heads // q.shape[1], dim=1)
    return ((scores * decay) @ x).transpose(1, 2)


@without_autocast
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Equation 6, one token (T = 1) that continues `state`. Returns y [B, 1, H, V] and the state after it."""
    heads = v.shape[2]
    q, k = (t[:, 0].to(state.dtype).repeat_interleave(heads // t.shape[2], dim=1) for t in (q, k))
    fed = segments.mask(v)[:, 0].to(state.dtype)
    decay = decay_of_one(log_decay, state.dtype, segments)
    state = state * decay[..., None, None] + k[..., :, None] * fed[..., None, :]
    y = segments.mask((q[..., None, :] @ state)[:, None, :, 0])
    return y, state


@without_autocast
def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Equation 7: T tokens that continue `state`, in chunks of at most `chunk_size`.

    Returns y [B, T, H, V], at least float32, and the state after the last real token.
    """
    return in_spans(_span, q, k, v, log_decay, state, segments, chunk_size)


def in_spans(
    span: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    segments: Segments,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`span` over the whole chunks, and over what is left.

    A ragged last chunk is a chunk of its own length, so it decays the state by just the tokens it has. A length that
    is not known yet is one chunk.
    """
    tokens = v.shape[1]
    if is_open(tokens):
        whole: tuple[Tensor, Tensor] = span(q, k, v, log_decay, state, segments, tokens)
        return whole
    if tokens == 0:
        return v.to(state.dtype), state
    parts = []
    for start, stop in pairwise(sorted({0, tokens - tokens % chunk_size, tokens})):
        part, size = slice(start, stop), min(chunk_size, stop - start)
        decay = log_decay if log_decay.dim() == 1 else log_decay[:, part]
        y, state = span(q[:, part], k[:, part], v[:, part], decay, state, segments.slice(start, stop), size)
        parts.append(y)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), state


class Decays(NamedTuple):
    """How a span's tokens reach each other and the states between its n chunks of C tokens (batch may be 1)."""

    total: Tensor  # [B, n, H, C] float64, the log decay from a chunk's start through token i
    entering: Tensor  # [B, n, H, C] from the state before a chunk to its token i
    leaving: Tensor  # [B, n, H, C] from token j of a chunk to the state after it
    across: Tensor  # [B, n, H] from the state before a chunk to the state after it


def _span(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Segments, size: int
) -> tuple[Tensor, Tensor]:
    """A whole number of chunks of `size` tokens; R is the number of value heads that share a query head."""
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    R, n = H // G, T // size
    decays = decays_of(log_decay, segments, T, size, state.dtype)
    q, k = (t.to(state.dtype).reshape(B, n, size, G, K).transpose(2, 3) for t in (q, k))
    x = v.to(state.dtype).reshape(B, n, size, H, V).transpose(2, 3)

    inner: Tensor = _Decayed.apply(q @ k.mT, decays.total, _visible(segments, size, q.device)) @ x

    left = (x * decays.leaving[..., None]).unflatten(2, (G, R))
    fed = k.mT @ left.transpose(3, 4).reshape(B, n, G, size, R * V)
    before, state = _scan(fed, decays.across, state)
    carried = (q @ before).unflatten(-1, (R, V)).transpose(3, 4).flatten(2, 3)

    y = torch.addcmul(inner, carried, decays.entering[..., None])
    return y.transpose(2, 3).reshape(B, T, H, V), state


def _scan(fed: Tensor, across: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, [B, n, G, K, R V], from what each feeds, and the state after the last."""
    B, n, G, K, RV = fed.shape
    R = across.shape[2] // G
    V = RV // R
    running = state.unflatten(1, (G, R)).transpose(2, 3).reshape(B, G, K, RV)
    factor = across.unflatten(2, (G, 1, R))[..., None].expand(-1, n, G, 1, R, V).flatten(-2)
    before = []
    for more, kept in zip(fed.unbind(1), factor.unbind(1), strict=True):
        before.append(running)
        running = torch.addcmul(more, running, kept)
    after = running.unflatten(-1, (R, V)).transpose(2, 3).flatten(1, 2)
    return torch.stack(before, 1), after


def decays_of(log_decay: Tensor, segments: Segments, tokens: int, size: int, dtype: torch.dtype) -> Decays:
    """How `tokens` tokens in chunks of `size` reach each other."""
    if log_decay.dim() == 1 and segments.plain:
        tokens = size  # every chunk is alike
    total = _per_token(log_decay, tokens, segments).unflatten(1, (-1, size)).cumsum(2).transpose(2, 3)
    last = total[..., -1:]
    entering, leaving, across = total.exp(), (last - total).exp(), last[..., 0].exp()
    if not segments.plain:
        label, running = (t.unflatten(1, (-1, size)) for t in (segments.label, segments.running))
        after = running[..., -1:]
        start = torch.nn.functional.pad(after[:, :-1], (0, 0, 1, 0))
        entering = entering * (label == start)[:, :, None]
        leaving = leaving * (label == after)[:, :, None]
        across = across * (start == after)
    return Decays(total, entering.to(dtype), leaving.to(dtype), across.to(dtype))


def _visible(segments: Segments, size: int, device: torch.device) -> Tensor:
    """[C, C] or [B, n, 1, C, C] bool: which tokens of a chunk see each other."""
    visible = _causal(size, device)
    if segments.plain:
        return visible
    label = segments.label.unflatten(1, (-1, size))
    same: Tensor = (label[..., :, None] == label[..., None, :])[:, :, None]
    return visible & same


def decay_of_one(log_decay: Tensor, dtype: torch.dtype, segments: Segments) -> Tensor:
    """[B or 1, H], what one token leaves of the state: nothing where it begins a document."""
    decay = _per_token(log_decay, 1, segments)[:, 0].exp().to(dtype)
    return decay if segments.plain else decay * (segments.running == 0)


def _per_token(log_decay: Tensor, tokens: int, segments: Segments) -> Tensor:
    """[B or 1, tokens, H] float64, zero at the padding: what is not there does not decay a state."""
    decay = log_decay.double()
    if decay.dim() == 1:
        decay = decay.expand(1, tokens, -1)
    return segments.mask(decay)


def _causal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


class _Decayed(torch.autograd.Function):
    """scores [B, n, G, C, C] times exp(total_i - total_j) where visible, for every head: [B, n, H, C, C].

    The differences are float64 and never stored as such; masked before the exponential, nothing overflows.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, total: Tensor, visible: Tensor) -> Tensor:
        later, earlier = total[..., :, None], total[..., None, :]
        shape = torch.broadcast_shapes(later.shape, earlier.shape, visible.shape)
        if makes_program():  # whose gradients cannot pass what is written into a given tensor
            decay = (later - earlier).to(scores.dtype).masked_fill(~visible, -torch.inf).exp()
        else:
            decay = torch.empty(shape, dtype=scores.dtype, device=scores.device)
            torch.sub(later.expand(shape), earlier, out=decay)
            decay.masked_fill_(~visible, -torch.inf).exp_()
        ctx.save_for_backward(scores, decay)
        ctx.total_shape = total.shape
        return (_by_group(decay, scores) * scores.unsqueeze(3)).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        scores, decay = ctx.saved_tensors
        grad = _by_group(grads[0], scores) * _by_group(decay, scores)
        for_scores = grad.sum(3) if grad.shape[3] > 1 else grad.squeeze(3)
        if not ctx.needs_input_grad[1]:
            return for_scores, None, None
        grad = (grad * scores.unsqueeze(3)).flatten(2, 3)
        for_total = grad.sum(-1, dtype=torch.float64) - grad.sum(-2, dtype=torch.float64)
        return for_scores, for_total.sum_to_size(ctx.total_shape), None


def _by_group(heads: Tensor, scores: Tensor) -> Tensor:
    """[B, n, H, C, C] as [B, n, G, R, C, C]."""
    grouped: Tensor = heads.unflatten(2, (scores.shape[2], -1))
    return grouped


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), anywhere)
