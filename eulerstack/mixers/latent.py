"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds a latent, not keys and values."""

import torch
from torch import Tensor, nn

from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import matmul_flops
from ..layers.linear import is_bare, project
from ..layers.norm import RMSNorm
from ..layers.rope import make_rope, phases, rotate
from ..layers.share import Share, Split, columns
from ..segments import Segments
from ..spec import AttentionSpec, StackSpec
from ..state import LatentState
from .attention import LogitsOf, reset_attention
from .base import score_scale
from .cached import CachedAttention, Entries


class LatentAttention(CachedAttention[LatentState]):
    """Keys and values are linear in a normed latent of L channels; one rotated key of R channels serves all heads.

    `parallel` and `chunkwise` make keys and values of the latents; `recurrent` takes the query and the sum to the
    latents instead, so that a step reads L + R numbers a token.
    """

    def __init__(self, spec: AttentionSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        model, rotary = stack.model, stack.embedding.positional == "rope"
        assert spec.latent_dim is not None
        self.heads, self.window, self.attn_drop = model.n_heads, spec.window, spec.attn_drop
        self.key_dim, self.latent_dim = model.d_model // self.heads, spec.latent_dim
        self.turned = spec.rotated_width(self.key_dim, rotary)
        self.rope = make_rope(stack.embedding, model.max_seq_len, self.turned) if rotary else None
        base = model.base.head_dim
        scale = score_scale(self.key_dim + self.turned, base + spec.rotated_width(base, rotary))
        self.logits = LogitsOf(spec, stack, scale)
        self.measures = self.logits.slopes is not None
        sizes = {"head_dim": self.key_dim + self.turned, "value_dim": self.key_dim}
        needs = {"sinks": spec.attention_sinks is not None, "capped_drop": bool(spec.attn_drop and spec.logit_softcap)}
        self.choices = (select("attention", target, **needs, **sizes),)
        self.ops = self.choices[0].kernels
        heads_width = self.heads * self.key_dim
        self.q_proj = nn.Linear(model.d_model, self.heads * (self.key_dim + self.turned), bias=False)
        self.latent_proj = nn.Linear(model.d_model, self.latent_dim + self.turned, bias=False)
        self.latent_norm = RMSNorm(self.latent_dim)
        self.k_proj = nn.Linear(self.latent_dim, heads_width, bias=False)
        self.v_proj = nn.Linear(self.latent_dim, heads_width, bias=False)
        self.o_proj = nn.Linear(heads_width, model.d_model, bias=False)

    def _entries(self, x: Tensor, segments: Segments) -> tuple[Tensor, Entries]:
        """q [B, T, H, K + R], and the normed latent [B, T, L] and rotated key [B, T, R]."""
        q = project(x, self.q_proj).unflatten(-1, (self.heads, self.key_dim + self.turned))
        latent, key = project(x, self.latent_proj).split([self.latent_dim, self.turned], -1)
        if self.rope is not None:
            turn = phases(segments, self.rope, x.dtype)
            plain, turned = q.split([self.key_dim, self.turned], -1)
            q, key = torch.cat([plain, rotate(turned, *turn)], -1), rotate(key[:, :, None], *turn)[:, :, 0]
        return q, (self.latent_norm(latent), key)

    def _whole(self, q: Tensor, entries: Entries, segments: Segments) -> Tensor:
        return self._out(self.ops.whole(q, *self._expanded(entries), segments, self.window, self.logits(), self._drop))

    def _over(self, q: Tensor, entries: Entries, visible: Tensor, distance: Tensor | None, step: bool) -> Tensor:
        if step and is_bare(self.k_proj) and is_bare(self.v_proj):  # their weights are read
            return self._absorbed(q, entries, visible, distance)
        return self._out(self.ops.cached(q, *self._expanded(entries), visible, distance, self.logits()))

    def _expanded(self, entries: Entries) -> Entries:
        """k [B, S, H, K + R] and v [B, S, H, K]."""
        latent, key = entries
        k, v = (project(latent, p).unflatten(-1, (self.heads, self.key_dim)) for p in (self.k_proj, self.v_proj))
        return torch.cat([k, key[:, :, None].expand(-1, -1, self.heads, -1)], -1), v

    def _absorbed(self, q: Tensor, entries: Entries, visible: Tensor, distance: Tensor | None) -> Tensor:
        """Multi-query attention over latents: q W_k meets the latent, and W_v is applied to the sum."""
        latent, key = entries
        plain, turned = q.split([self.key_dim, self.turned], -1)
        k_weight, v_weight = (p.weight.unflatten(0, (self.heads, self.key_dim)) for p in (self.k_proj, self.v_proj))
        query = torch.cat([torch.einsum("bthk,hkl->bthl", plain, k_weight.to(plain.dtype)), turned], -1)
        shared = torch.cat([latent, key], -1)[:, :, None]
        total = self.ops.cached(query, shared, latent[:, :, None], visible, distance, self.logits())
        return self._out(torch.einsum("bthl,hkl->bthk", total, v_weight.to(total.dtype)))

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> LatentState:
        device, dtype = self.placement(device, dtype)
        slots, window = self._slots(max_tokens, rollback)
        latent, rotated = (
            torch.zeros(batch, slots, n, device=device, dtype=dtype) for n in (self.latent_dim, self.turned)
        )
        return LatentState(latent, rotated, window=window)

    def flops(self, tokens: int) -> int:
        """Of the expanded form: scores of K + R channels and sums of K over the keys that each query sees."""
        return matmul_flops(self, tokens) + 2 * self._pairs(tokens) * self.heads * (2 * self.key_dim + self.turned)

    def split(self, share: Share) -> Split:
        """By heads; the latents are held whole."""
        self.share, self.heads = share, share.divided(self.heads, "model.n_heads")
        parts = columns(f"{name}_proj.weight" for name in "qkv")
        return {**parts, "o_proj.weight": 1, **self.logits.split(share)}

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        reset_attention(self, out_scale)
