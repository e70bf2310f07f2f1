"""Attention by torch.nn.functional.scaled_dot_product_attention, which chooses flash kernels where it has them."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..provider import Provider, anywhere


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """q [B, T, H, K] over k, v [B, S, Hkv, K]; visible [B or 1, T, S] bool, or None for plain causal (S = T).

    A query that sees nothing returns zeros. Returns [B, T, H, K].
    """
    y = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if visible is None else visible[:, None],
        is_causal=visible is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


PROVIDER = Provider(attend, anywhere)
