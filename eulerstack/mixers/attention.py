"""Causal softmax attention: multi-head, grouped-query or multi-query, with RoPE and sliding windows."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear
from ..layers.rope import phases, rotate
from ..segments import Segments
from ..spec import AttentionSpec, StackSpec
from ..state import KVState
from .base import Mixer, check_one_token, checked, continued, matmul_flops, placed


class Attention(Mixer[KVState]):
    """softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017), kv heads shared as in Ainslie et al. 2023 (arXiv 2305.13245).

    With a window w a token sees itself and the w - 1 tokens before it, and the cache keeps no more.
    """

    def __init__(self, spec: AttentionSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        model = stack.model
        self.heads, self.kv_heads = model.n_heads, model.kv_heads
        self.key_dim = model.d_model // self.heads
        self.window = spec.window
        self.theta = stack.embedding.rope_theta if stack.embedding.positional == "rope" else None
        self.choices = (select("attention", target),)
        self.attend = self.choices[0].kernels
        kv_width = self.kv_heads * self.key_dim
        self.q_proj = nn.Linear(model.d_model, model.d_model, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(model.d_model, kv_width, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(model.d_model, kv_width, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(model.d_model, model.d_model, bias=False)

    @property
    def grows(self) -> bool:  # type: ignore[override]
        return self.window is None

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        segments = placed(segments, x)
        q, k, v = self._heads(x, segments)
        return self._out(self.attend(q, k, v, self._among(x.shape[1], segments)), segments)

    def chunkwise(
        self, x: Tensor, state: KVState, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, KVState]:
        """Queries of each chunk over the cache and the chunk itself; the whole x is one chunk by default."""
        segments, size = continued(segments), checked(chunk_size, max(1, x.shape[1]))
        parts = []
        for start in range(0, x.shape[1], size):
            stop = min(start + size, x.shape[1])
            y, state = self._chunk(x[:, start:stop], state, segments.slice(start, stop))
            parts.append(y)
        return torch.cat(parts, 1) if parts else x, state

    def _chunk(self, x: Tensor, state: KVState, segments: Segments) -> tuple[Tensor, KVState]:
        """Attends to the cache and the new tokens together, before the ring is written."""
        q, k, v = self._heads(x, segments)
        among = self._among(x.shape[1], segments)
        if among is None:
            among = _causal(x.shape[1], x.device)
        before = self._cached(state, segments, segments.before(x.shape[0]), "before")
        if not segments.plain:
            before = before & (segments.label == 0)[..., None]
        visible = torch.cat([before, among.expand(before.shape[0], -1, -1)], -1)
        held = before.shape[2]
        keys, values = (torch.cat([a[:, :held], b.to(a.dtype)], 1) for a, b in ((state.keys, k), (state.values, v)))
        y = self.attend(q.to(keys.dtype), keys, values, visible)
        return self._out(y.to(x.dtype), segments), self._written(state, k, v, segments)

    def recurrent(self, x: Tensor, state: KVState, segments: Segments | None = None) -> tuple[Tensor, KVState]:
        """One query over the cache, which already holds its own key."""
        check_one_token(x)
        segments = continued(segments)
        q, k, v = self._heads(x, segments)
        state = self._written(state, k, v, segments)
        visible = self._cached(state, segments, segments.ends(segments.before(x.shape[0])), "after")
        held = visible.shape[2]
        y = self.attend(q.to(state.keys.dtype), state.keys[:, :held], state.values[:, :held], visible)
        return self._out(y.to(x.dtype), segments), state

    def _heads(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K] and k, v [B, T, Hkv, K]."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        bias = torch.cat([p.bias for p in parts]) if self.q_proj.bias is not None else None
        joined = F.linear(x, torch.cat([p.weight for p in parts]), bias).unflatten(-1, (-1, self.key_dim))
        turned, v = joined.split([self.heads + self.kv_heads, self.kv_heads], 2)
        if self.theta is not None:
            turned = rotate(turned, *phases(segments, self.key_dim, self.theta, x.dtype))
        q, k = turned.split([self.heads, self.kv_heads], 2)
        return q, k, v

    def _out(self, y: Tensor, segments: Segments) -> Tensor:
        return segments.mask(self.o_proj(y.flatten(2)))

    def _among(self, tokens: int, segments: Segments) -> Tensor | None:
        """[B or 1, T, T] bool: which tokens of this call see each other; None where that is plainly causal."""
        window = self.window
        if segments.plain and (window is None or window >= tokens):
            return None

        def make() -> Tensor:
            device = segments.position.device if segments.position is not None else None
            causal = _causal(tokens, device) if segments.plain else segments.together
            return causal if window is None else causal & ~_causal(tokens, device).tril(-window)

        mask: Tensor = segments.once(("among", window), make)
        return mask

    def _cached(self, state: KVState, segments: Segments, length: Tensor, when: str) -> Tensor:
        """[B, T, slots in use] bool: which slots of a cache that has seen `length` [B] tokens each query sees.

        `when` says whether that is before or after this call's tokens were written.
        """
        assert segments.position is not None
        size = state.keys.shape[1]
        used = size if segments.bound is None else min(size, segments.bound + (segments.position.shape[1] == 1))

        def make() -> Tensor:
            last = length[:, None] - 1
            held = last - (last - torch.arange(used, device=length.device)) % size  # the position in each slot
            visible = (held >= 0)[:, None].expand(-1, segments.position.shape[1], -1)  # type: ignore[union-attr]
            if self.window is None:
                return visible
            return visible & (segments.position[..., None] - held[:, None] < self.window)  # type: ignore[index]

        mask: Tensor = segments.once(("cached", when, self.window, size, used), make)
        return mask

    def _written(self, state: KVState, k: Tensor, v: Tensor, segments: Segments) -> KVState:
        """The cache with the tokens of each row's last document in their slots."""
        write = _write_plain if segments.plain else _write_ragged
        keys, values = (write(a, b.to(a.dtype), segments) for a, b in ((state.keys, k), (state.values, v)))
        return KVState(keys, values, window=state.window)

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> KVState:
        weight = self.q_proj.weight
        ring = None if self.window is None else self.window + rollback
        slots = max_tokens if ring is None else min(max_tokens, ring)
        shape = (batch, slots, self.kv_heads, self.key_dim)
        empty = torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype)
        window = self.window if slots == ring else None  # a cache too short for the window holds every token
        return KVState(empty, empty.clone(), window=window)

    def flops(self, tokens: int) -> int:
        """Scores and sums over the keys that each query sees."""
        full = tokens if self.window is None else min(self.window, tokens)
        seen = full * (full + 1) // 2 + (tokens - full) * full
        return matmul_flops(self, tokens) + 4 * seen * self.heads * self.key_dim

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        for name, layer in self.named_children():
            init_linear(layer, out_scale if name == "o_proj" else 1.0)


def _causal(size: int, device: torch.device | None) -> Tensor:
    return torch.ones(1, size, size, dtype=torch.bool, device=device).tril()


def _write_plain(cache: Tensor, new: Tensor, segments: Segments) -> Tensor:
    """The last S new tokens in the slots of their positions; in place under no_grad."""
    assert segments.position is not None
    size = cache.shape[1]
    new, position = new[:, -size:], segments.position[:, -size:]
    slots = (position % size)[..., None, None].expand_as(new)
    frozen = cache.is_inference() and not torch.is_inference_mode_enabled()
    return cache.scatter(1, slots, new) if torch.is_grad_enabled() or frozen else cache.scatter_(1, slots, new)


def _write_ragged(cache: Tensor, new: Tensor, segments: Segments) -> Tensor:
    """Each slot takes the token that belongs in it, if that is among the new tokens of the row's last document."""
    size = cache.shape[1]
    end = segments.ends(segments.before(cache.shape[0]))[:, None]
    slot = torch.arange(size, device=cache.device)
    back = (end - 1 - slot) % size  # how far before the last token
    source = (segments.first + segments.count - 1)[:, None] - back
    own = segments.label == segments.running[:, -1:]
    reach = own.sum(1)[:, None]
    taken = (back < reach)[..., None, None]
    found = new.gather(1, source.clamp(0, new.shape[1] - 1)[..., None, None].expand(-1, -1, *new.shape[2:]))
    return torch.where(taken, found, cache)
