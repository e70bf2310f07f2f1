"""Attention by torch.nn.functional.scaled_dot_product_attention, which chooses flash kernels where it has them.

A soft-cap is beyond it: such logits are computed in the open, in at least float32.
"""

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad, scaled_dot_product_attention

from ...segments import Segments
from ..precision import wide, without_autocast
from ..provider import Provider, anywhere
from . import Attending, Logits


def whole(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None, logits: Logits, drop: float = 0.0
) -> Tensor:
    """Tokens of one call among themselves (S = T), each document for itself. Returns [B, T, H, V].

    drop: the share of weights that are dropped, and the others scaled up.
    """
    tokens = q.shape[1]
    if segments.plain and (window is None or window >= tokens) and logits.slopes is None and logits.sinks is None:
        return _attended(q, k, v, None, logits, drop)
    visible = segments.among(window)
    distance = None if logits.slopes is None else segments.apart
    return cached(q, k, v, visible, distance, logits, drop)


def cached(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, distance: Tensor | None, logits: Logits, drop: float = 0.0
) -> Tensor:
    """Any keys; visible and distance (used with slopes) are [B or 1, T, S]. Returns [B, T, H, V].

    A query that sees nothing returns zeros.
    """
    bias = _bias(visible, distance, logits, q)
    if logits.sinks is not None:
        more = logits.sinks.shape[1]
        k, v = pad(k, (0, 0, 0, 0, 0, more)), pad(v, (0, 0, 0, 0, 0, more))
    return _attended(q, k, v, bias, logits, drop)


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Logits, drop: float) -> Tensor:
    attend = _uncapped if logits.softcap is None else _capped
    return attend(q, k, v, bias, logits, drop)


def _bias(visible: Tensor, distance: Tensor | None, logits: Logits, q: Tensor) -> Tensor:
    """What is added to the logits, [B or 1, H or 1, T, S (+ sinks)], or the mask itself where that is all."""
    if logits.slopes is None and logits.sinks is None:
        return visible[:, None]
    dtype = wide(q.dtype)
    bias = torch.zeros_like(visible, dtype=dtype)[:, None]
    if logits.slopes is not None and distance is not None:
        bias = distance[:, None].to(dtype) * -logits.slopes.to(bias)[:, None, None]
    bias = bias.masked_fill(~visible[:, None], -torch.inf)
    if logits.sinks is not None:
        sinks = logits.sinks.to(bias)[None, :, None].expand(bias.shape[0], -1, bias.shape[2], -1)
        bias = torch.cat([bias.expand(-1, sinks.shape[1], -1, -1), sinks], -1)
    return bias


def _uncapped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Logits, drop: float) -> Tensor:
    """Where something is added to the logits, q, k and v take its dtype: 16 bits are too few for far distances."""
    dtype = q.dtype if bias is None or bias.dtype == torch.bool else bias.dtype
    queries, keys, values = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    y = scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=bias,
        dropout_p=drop,
        is_causal=bias is None,
        scale=logits.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.to(q.dtype).transpose(1, 2)


@without_autocast
def _capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logits: Logits, drop: float) -> Tensor:
    """cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118), all of them at once."""
    assert logits.softcap is not None
    dtype, shared = wide(q.dtype), q.shape[2] // k.shape[2]
    queries = q.to(dtype).transpose(1, 2)
    keys, values = (t.to(dtype).transpose(1, 2).repeat_interleave(shared, 1) for t in (k, v))
    scores = logits.softcap * torch.tanh(queries @ keys.mT * (logits.scale / logits.softcap))
    if bias is None:
        bias = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    unseen = ~(scores > -torch.inf).any(-1, keepdim=True)
    weights = scores.masked_fill(unseen, 0).softmax(-1).masked_fill(unseen, 0)
    if drop:
        weights = dropout(weights, drop)
    return (weights @ values).to(q.dtype).transpose(1, 2)


def continued(q: Tensor, past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], logits: Logits) -> Tensor | None:
    """Queries of T new tokens over all of a past (k, v) [B, S, ...], and causally among themselves: [B, T, H, V].

    On a CPU, of plain logits that want no gradient: the two are attended to apart, without a mask, and joined by what
    their softmaxes divided by. 1,024 tokens after 3,072 take 0.6 of the time. None where `cached` has to serve.
    """
    if not q.is_cpu or q.numel() == 0 or not logits.plain or torch.is_grad_enabled():
        return None
    shared = q.shape[2] // past[0].shape[2]
    k, v = (t.repeat_interleave(shared, 2) if shared > 1 else t for t in new)
    within, total = _summed(q, k, v, logits.scale, causal=True)
    if past[0].shape[1] == 0:
        return within
    # Queries that share a kv head stand as tokens, which all see the same: the past is not copied.
    many = q.unflatten(2, (-1, shared)).transpose(2, 3).flatten(1, 2)
    before, more = (
        t.unflatten(1, (-1, shared)).transpose(2, 3).flatten(2, 3)
        for t in _summed(many, *past, logits.scale, causal=False)
    )
    return torch.lerp(within, before, torch.sigmoid(more - total)[..., None].to(within.dtype))


def _summed(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [B, T, H, V], and the log of the sum that each softmax divided by, [B, T, H]."""
    parts = (t.transpose(1, 2) for t in (q, k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y, total = flash(*parts, 0.0, causal, scale=scale)
    return y.transpose(1, 2), total.transpose(1, 2)


PROVIDER = Provider(Attending(whole, cached, continued), anywhere)
