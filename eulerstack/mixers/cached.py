"""What all attention has in common: a cache of one entry a token, and who sees what in it."""

from abc import abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..layers.linear import project
from ..segments import Segments
from ..state import RingState
from .base import Mixer, check_one_token, continued, in_chunks, placed

R = TypeVar("R", bound=RingState)
Entries = tuple[Tensor, Tensor]


class CachedAttention(Mixer[R], Generic[R]):
    """A mixer whose state holds two tensors [B, S, ...], an entry a token in each.

    With a window w a token sees itself and the w - 1 tokens before it, and the cache keeps no more.
    """

    window: int | None
    o_proj: nn.Linear
    measures: bool = False  # whether logits depend on how far back a key is
    attn_drop: float = 0.0

    @property
    def grows(self) -> bool:  # type: ignore[override]
        return self.window is None

    @property
    def _drop(self) -> float:
        """The share of attention weights to drop from a whole sequence."""
        return self.attn_drop if self.training else 0.0

    @abstractmethod
    def _entries(self, x: Tensor, segments: Segments) -> tuple[Tensor, Entries]:
        """The queries, and what the cache keeps of each token."""

    @abstractmethod
    def _whole(self, q: Tensor, entries: Entries, segments: Segments) -> Tensor:
        """The tokens of a call among themselves, [B, T, D]."""

    @abstractmethod
    def _over(self, q: Tensor, entries: Entries, visible: Tensor, distance: Tensor | None, step: bool) -> Tensor:
        """Queries over S entries; visible, and distance if it `measures`, [B, T, S]. `step`: T is 1 by the form."""

    def _continued(self, q: Tensor, past: Entries, new: Entries) -> Tensor | None:
        """New tokens over all of a past and among themselves, [B, T, D]; None where that takes a mask."""
        return None

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        segments = placed(segments, x)
        return segments.mask(self._whole(*self._entries(x, segments), segments))

    def chunkwise(
        self, x: Tensor, state: R, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, R]:
        """Queries of each chunk over the cache and the chunk itself; the whole x is one chunk by default."""
        return in_chunks(self._chunk, x, state, segments, chunk_size)

    def _chunk(self, x: Tensor, state: R, segments: Segments) -> tuple[Tensor, R]:
        """Attends to the cache and the new tokens together, before the ring is written."""
        q, new = self._entries(x, segments)
        if self.window is None and self._abreast(segments):
            k, v = (cache[:, : segments.bound] for cache in state.tensors().values())
            y = self._continued(q.to(k.dtype), (k, v), (new[0].to(k.dtype), new[1].to(v.dtype)))
            if y is not None:
                return y.to(x.dtype), self._written(state, new, segments)
        before, past = self._cached(state, segments, segments.before(x.shape[0]), "before")
        if not segments.plain:
            before = before & (segments.label == 0)[..., None]
        visible = _beside(before, segments.among(self.window))
        distance = None if past is None or not self.measures else _beside(past, segments.apart)
        caches = (cache[:, : before.shape[2]] for cache in state.tensors().values())
        held, more = (torch.cat([a, b.to(a.dtype)], 1) for a, b in zip(caches, new, strict=True))
        y = self._over(q.to(held.dtype), (held, more), visible, distance, step=False)
        return segments.mask(y.to(x.dtype)), self._written(state, new, segments)

    def recurrent(self, x: Tensor, state: R, segments: Segments | None = None) -> tuple[Tensor, R]:
        """One query over the cache, which already holds its own entry."""
        check_one_token(x)
        segments = continued(segments)
        q, new = self._entries(x, segments)
        state = self._written(state, new, segments)
        visible, distance = self._cached(state, segments, segments.ends(segments.before(x.shape[0])), "after")
        held, more = (cache[:, : visible.shape[2]] for cache in state.tensors().values())
        y = self._over(q.to(held.dtype), (held, more), visible, distance, step=True)
        return segments.mask(y.to(x.dtype)), state

    @staticmethod
    def _abreast(segments: Segments) -> bool:
        """Whether all rows stand at the bound, and nothing is padded or packed; False where that costs a wait."""
        start, bound = segments.start, segments.bound
        if torch.is_grad_enabled() or not segments.plain or start is None or bound is None or not start.is_cpu:
            return False
        return bool(segments.once("abreast", lambda: (start == bound).all().item()))

    def _out(self, y: Tensor) -> Tensor:
        return project(y.flatten(2), self.o_proj)

    def _cached(self, state: R, segments: Segments, length: Tensor, when: str) -> tuple[Tensor, Tensor | None]:
        """Which slots of a cache that has seen `length` [B] tokens each query sees, and how far back, [B, T, used].

        `when` says whether that is before or after this call's tokens were written.
        """
        assert segments.position is not None
        size, position = state.slots, segments.position
        used = size if segments.bound is None else min(size, segments.bound + (position.shape[1] == 1))

        def make() -> tuple[Tensor, Tensor | None]:
            last = length[:, None] - 1
            held = last - (last - torch.arange(used, device=length.device)) % size  # the position in each slot
            visible = (held >= 0)[:, None].expand(-1, position.shape[1], -1)
            if self.window is None and not self.measures:
                return visible, None
            distance = position[..., None] - held[:, None]
            return visible if self.window is None else visible & (distance < self.window), distance

        found: tuple[Tensor, Tensor | None] = segments.once(
            ("cached", when, self.window, size, used, self.measures), make
        )
        return found

    def _written(self, state: R, new: Entries, segments: Segments) -> R:
        """The caches with the tokens of each row's last document in their slots."""
        caches = list(state.tensors().values())
        after = [written(cache, entry, segments) for cache, entry in zip(caches, new, strict=True)]
        if all(a is b for a, b in zip(after, caches, strict=True)):
            return state  # written in place
        fresh = iter(after)
        return state.map(lambda _: next(fresh))

    def _slots(self, max_tokens: int, rollback: int) -> tuple[int, int | None]:
        """How many slots the cache has, and its window: one too short for the window holds every token."""
        ring = None if self.window is None else self.window + rollback
        slots = max_tokens if ring is None else min(max_tokens, ring)
        return slots, self.window if slots == ring else None

    def _pairs(self, tokens: int) -> int:
        """Pairs of a query and a key that it sees."""
        full = tokens if self.window is None else min(self.window, tokens)
        return full * (full + 1) // 2 + (tokens - full) * full


def _beside(cached: Tensor, own: Tensor) -> Tensor:
    """[B, T, S + T]"""
    return torch.cat([cached, own.expand(cached.shape[0], -1, -1)], -1)


def written(cache: Tensor, new: Tensor, segments: Segments) -> Tensor:
    """The cache [B, S, ...] with the new tokens [B, T, ...] of each row's last document in their slots."""
    new = new.to(cache.dtype)
    if segments.plain:
        return _write_plain(cache, new, segments)
    return _write_one(cache, new, segments) if new.shape[1] == 1 else _write_ragged(cache, new, segments)


def _write_one(cache: Tensor, new: Tensor, segments: Segments) -> Tensor:
    """One token [B, 1, ...] in its slot; rows of padding write back what the slot holds."""
    place = _place(cache, segments, 1)
    real = (segments.label >= 0).reshape(new.shape[0], 1, *[1] * (new.dim() - 2))
    return _put(cache, place, torch.where(real, new, cache[place]))


def _write_plain(cache: Tensor, new: Tensor, segments: Segments) -> Tensor:
    """The last S new tokens in the slots of their positions."""
    new = new[:, -cache.shape[1] :]
    return _put(cache, _place(cache, segments, new.shape[1]), new)


def _place(cache: Tensor, segments: Segments, tokens: int) -> tuple[Tensor, Tensor]:
    """Row [B, 1] and slot [B, T] of the last `tokens` tokens in a cache [B, S, ...]."""
    batch, size, position = cache.shape[0], cache.shape[1], segments.position
    assert position is not None

    def make() -> tuple[Tensor, Tensor]:
        rows = torch.arange(batch, device=position.device)[:, None]
        return rows, (position[:, -tokens:] % size).expand(batch, -1)

    found: tuple[Tensor, Tensor] = segments.once(("place", batch, size, tokens), make)
    return found


def _put(cache: Tensor, place: tuple[Tensor, Tensor], new: Tensor) -> Tensor:
    """In place under no_grad. By index: a CPU's scatter is a thousand times slower in 16 bits."""
    frozen = cache.is_inference() and not torch.is_inference_mode_enabled()
    return cache.index_put(place, new) if torch.is_grad_enabled() or frozen else cache.index_put_(place, new)


def _write_ragged(cache: Tensor, new: Tensor, segments: Segments) -> Tensor:
    """Each slot takes the token that belongs in it, if that is among the new tokens of the row's last document."""
    size = cache.shape[1]
    end = segments.ends(segments.before(cache.shape[0]))[:, None]
    slot = torch.arange(size, device=cache.device)
    back = (end - 1 - slot) % size  # how far before the last token
    source = (segments.first + segments.count - 1)[:, None] - back
    own = segments.label == segments.running[:, -1:]
    shape = (*back.shape, *[1] * (new.dim() - 2))
    taken = (back < own.sum(1)[:, None]).reshape(shape)
    source = source.clamp(0, new.shape[1] - 1).reshape(shape).expand(-1, -1, *new.shape[2:])
    return torch.where(taken, new.gather(1, source), cache)
