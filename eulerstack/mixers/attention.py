"""Causal softmax attention: multi-head, grouped-query or multi-query."""

import torch
from torch import Tensor, nn

from ..kernels.attention import Logits
from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear, matmul_flops
from ..layers.linear import project
from ..layers.norm import RMSNorm
from ..layers.precision import FullPrecision
from ..layers.rope import alibi_slopes, make_rope, phases, rotate
from ..layers.share import Share, Split, columns
from ..segments import Segments
from ..spec import AttentionSpec, StackSpec
from ..state import KVState
from .base import score_scale
from .cached import CachedAttention, Entries


class Attention(CachedAttention[KVState]):
    """softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017), kv heads shared as in Ainslie et al. 2023 (arXiv 2305.13245).

    qk_norm is an RMSNorm of each head's q and k before the rotation (Dehghani et al. 2023, arXiv 2302.05442).
    """

    def __init__(self, spec: AttentionSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        model = stack.model
        self.heads, self.kv_heads, self.window = model.n_heads, model.kv_heads, spec.window
        self.key_dim, self.attn_drop = model.d_model // self.heads, spec.attn_drop
        self.logits = LogitsOf(spec, stack, score_scale(self.key_dim, model.base.head_dim))
        self.measures = self.logits.slopes is not None
        sizes = {"head_dim": self.key_dim, "value_dim": self.key_dim}
        needs = {"sinks": spec.attention_sinks is not None, "capped_drop": bool(spec.attn_drop and spec.logit_softcap)}
        self.choices = (select("attention", target, **needs, **sizes),)
        self.ops = self.choices[0].kernels
        rotary = stack.embedding.positional == "rope"
        self.rope = make_rope(stack.embedding, model.max_seq_len, self.key_dim) if rotary else None
        kv_width = self.kv_heads * self.key_dim
        self.q_proj = nn.Linear(model.d_model, model.d_model, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(model.d_model, kv_width, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(model.d_model, kv_width, bias=spec.qkv_bias)
        self.q_norm = RMSNorm(self.key_dim) if spec.qk_norm else None
        self.k_norm = RMSNorm(self.key_dim) if spec.qk_norm else None
        self.o_proj = nn.Linear(model.d_model, model.d_model, bias=False)

    def _entries(self, x: Tensor, segments: Segments) -> tuple[Tensor, Entries]:
        """q [B, T, H, K], and k, v [B, T, Hkv, K]."""
        projected = project(x, self.q_proj, self.k_proj, self.v_proj).unflatten(-1, (-1, self.key_dim))
        turned, v = projected.split([self.heads + self.kv_heads, self.kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turned.split([self.heads, self.kv_heads], 2)
            turned = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        if self.rope is not None:
            turned = rotate(turned, *phases(segments, self.rope, x.dtype))
        q, k = turned.split([self.heads, self.kv_heads], 2)
        return q, (k, v)

    def _whole(self, q: Tensor, entries: Entries, segments: Segments) -> Tensor:
        return self._out(self.ops.whole(q, *entries, segments, self.window, self.logits(), self._drop))

    def _over(self, q: Tensor, entries: Entries, visible: Tensor, distance: Tensor | None, step: bool) -> Tensor:
        return self._out(self.ops.cached(q, *entries, visible, distance, self.logits()))

    def _continued(self, q: Tensor, past: Entries, new: Entries) -> Tensor | None:
        y = self.ops.continued(q, past, new, self.logits())
        return None if y is None else self._out(y)

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> KVState:
        device, dtype = self.placement(device, dtype)
        slots, window = self._slots(max_tokens, rollback)
        shape = (batch, slots, self.kv_heads, self.key_dim)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        return KVState(empty, empty.clone(), window=window)

    def flops(self, tokens: int) -> int:
        """Scores and sums over the keys that each query sees."""
        return matmul_flops(self, tokens) + 4 * self._pairs(tokens) * self.heads * self.key_dim

    def split(self, share: Share) -> Split:
        """By heads; a single key head is held whole."""
        self.share, self.heads = share, share.divided(self.heads, "model.n_heads")
        shared = self.kv_heads == 1
        self.kv_heads = 1 if shared else share.divided(self.kv_heads, "model.n_kv_heads")
        names = ("q_proj",) if shared else ("q_proj", "k_proj", "v_proj")
        parts = columns(f"{name}.{part}" for name in names for part in ("weight", "bias"))
        return {**parts, "o_proj.weight": 1, **self.logits.split(share)}

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        reset_attention(self, out_scale)


class LogitsOf(nn.Module):
    """Makes the Logits of an attention layer, and owns what of them is learned."""

    def __init__(self, spec: AttentionSpec, stack: StackSpec, scale: float) -> None:
        super().__init__()
        heads, sinks = stack.model.n_heads, spec.attention_sinks
        self.scale, self.softcap = scale, spec.logit_softcap
        self.slopes = alibi_slopes(heads) if stack.embedding.positional == "alibi" else None
        self.fixed = (heads, sinks.n_per_head) if sinks is not None and not sinks.learnable else None
        learned = sinks is not None and sinks.learnable
        self.learned = FullPrecision({"sinks": (heads, sinks.n_per_head)}) if learned and sinks else None

    def forward(self) -> Logits:
        slopes = None if self.slopes is None else torch.tensor(self.slopes, dtype=torch.float64)
        return Logits(self.scale, self.softcap, slopes, self._sinks())

    def _sinks(self) -> Tensor | None:
        if self.learned is not None:
            return self.learned.tensor("sinks")
        return None if self.fixed is None else torch.zeros(self.fixed)

    def split(self, share: Share) -> Split:
        """By heads."""
        if self.slopes is not None:
            self.slopes = tuple(share.part(torch.tensor(self.slopes, dtype=torch.float64)).tolist())
        if self.fixed is not None:
            self.fixed = (self.fixed[0] // share.of, self.fixed[1])
        return {"logits.learned.sinks": 0}


def reset_attention(mixer: nn.Module, out_scale: float) -> None:
    """Linear layers and norms drawn anew; learned sinks start at zero."""
    for name, layer in mixer.named_children():
        if isinstance(layer, nn.Linear):
            init_linear(layer, out_scale if name == "o_proj" else 1.0)
        elif isinstance(layer, RMSNorm):
            layer.reset_parameters()
        elif isinstance(layer, LogitsOf) and layer.learned is not None:
            nn.init.zeros_(layer.learned.get_parameter("sinks"))
