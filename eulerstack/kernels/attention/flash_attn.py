"""Attention by flash-attn's CUDA kernels (Dao 2023, arXiv 2307.08691): each document is a sequence of a packed batch.

That serves the tokens of a call among themselves; queries over a cache, with its holes, are PyTorch's.
"""

from typing import Any

import torch
from flash_attn import flash_attn_varlen_func
from torch import Tensor

from ...segments import Segments
from ..precision import without_autocast
from ..provider import Provider, Target, on_gpu
from . import Attending, Logits
from .torch import cached, continued


@without_autocast
def whole(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None, logits: Logits, drop: float = 0.0
) -> Tensor:
    """Tokens of one call among themselves (S = T), each document for itself. Returns [B, T, H, V].

    drop: the share of weights that are dropped, and the others scaled up.
    """
    B, T = q.shape[:2]
    found = segments.documents(B)
    if found.place.numel() == 0:
        return q.new_zeros(B, T, q.shape[2], v.shape[3])
    bounds, longest = found.bounds.to(torch.int32), int(found.bounds.diff().max())
    some = flash_attn_varlen_func(
        *(found.packed(t).contiguous() for t in (q, k, v)),
        bounds,
        bounds,
        longest,
        longest,
        drop,
        softmax_scale=logits.scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=logits.softcap or 0.0,
        alibi_slopes=None if logits.slopes is None else logits.slopes.to(q.device, torch.float32),
    )
    return found.spread(some, B, T)


def refuses(
    target: Target,
    *,
    head_dim: int = 8,
    value_dim: int = 8,
    sinks: bool = False,
    capped_drop: bool = False,
    **needs: Any,
) -> str | None:
    """What the kernels were compiled for."""
    if target.dtype not in (torch.float16, torch.bfloat16):
        return f"has float16 and bfloat16, not {str(target.dtype).removeprefix('torch.')}"
    if sinks:
        return "has no attention sinks"
    if capped_drop:
        return "drops no attention weights (attn_drop) under a logit_softcap"
    if head_dim != value_dim or head_dim > 256 or head_dim % 8:
        return f"takes heads of up to 256 channels, in eights, as many in values; not {head_dim} and {value_dim}"
    return on_gpu(target)


PROVIDER = Provider(Attending(whole, cached, continued), refuses)
