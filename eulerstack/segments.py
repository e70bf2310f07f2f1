"""Which tokens of a batch are real, which belong together, and where they stand.

Left padding, right padding, ragged batches and packed documents are one concept here. The Stack fills in the
positions once a call and hands the same object to every mixer; mixers never count.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The target of a token that does not count in the loss."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Real tokens, documents and positions of a batch of B rows by T tokens.

    real:     [B, T] bool; None means every token is real. Real tokens are contiguous in a row.
    document: [B, T] int; a change of value starts a new document. None means one document a row.
    position: [B or 1, T] int64, each token's place in its own document. The Stack fills it in.
    carries:  [B] bool, whether the row's first document continues the incoming state. None means all do.
    start:    [B or 1] int64, tokens of the incoming document seen before this call. The Stack fills it in.
    bound:    an upper limit of `start` known without asking the device, if there is one. The Stack fills it in.
    """

    real: Tensor | None = None
    document: Tensor | None = None
    position: Tensor | None = None
    carries: Tensor | None = None
    start: Tensor | None = None
    bound: int | None = None
    _memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def dense(tokens: int, start: int | Tensor = 0, device: torch.device | str | None = None) -> "Segments":
        """Unpadded rows of one document each, whose first token stands at `start` (an int, or [B])."""
        bound = None if isinstance(start, Tensor) else start
        start = torch.as_tensor(start, dtype=torch.int64, device=device).reshape(-1)
        position = start[:, None] + torch.arange(tokens, device=start.device)
        return Segments(position=position, start=start, bound=bound)

    def placed(self, start: Tensor, tokens: int, bound: int | None = None) -> "Segments":
        """These segments with their positions, for rows whose state has already seen `start` [B] tokens.

        Raises ValueError for shapes that do not fit [B, tokens] and for holes between a row's real tokens.
        """
        if self.position is not None or self.start is not None:
            raise ValueError("segments.position is set: the stack owns positions; leave it None")
        self._check(start.shape[0], tokens)
        if self.plain:
            return replace(Segments.dense(tokens, start), bound=bound)
        if self.real is None and self.document is None:
            real = start.new_ones(start.shape[0], tokens, dtype=torch.bool)
            return replace(self, real=real).placed(start, tokens, bound)
        label = self.label
        index = torch.arange(tokens, device=label.device).expand_as(label)
        begins = _begins(label)
        offset = torch.where(begins, index, 0).cummax(1).values
        position = index - offset + torch.where(label == 0, start[:, None], 0)
        return replace(self, position=torch.where(label >= 0, position, 0), start=start, bound=bound)

    @property
    def plain(self) -> bool:
        """True where nothing is masked or reset: one real document a row, which continues the state."""
        return self.real is None and self.document is None and self.carries is None

    @cached_property
    def label(self) -> Tensor:
        """[B, T] int64: -1 padding, 0 the document that continues the incoming state, then 1, 2, ..."""
        some = self.real if self.real is not None else self.document
        assert some is not None, "plain segments have no labels"
        real = self.real if self.real is not None else torch.ones_like(some, dtype=torch.bool)
        document = self.document if self.document is not None else torch.zeros_like(some, dtype=torch.int64)
        before = torch.nn.functional.pad(document, (1, 0))[:, :-1]
        after_real = torch.nn.functional.pad(real, (1, 0))[:, :-1]
        label = (real & after_real & (document != before)).cumsum(1)
        if self.carries is not None:
            label = label + (~self.carries).long()[:, None]
        return torch.where(real, label, -1)

    @cached_property
    def running(self) -> Tensor:
        """[B, T] int64: the document that a state belongs to after each token (0: still the incoming one)."""
        return self.label.cummax(1).values.clamp(min=0)

    @cached_property
    def first(self) -> Tensor:
        """[B] int64: index of the row's first real token (0 in an all-padding row)."""
        return (self.label >= 0).long().argmax(1)

    @cached_property
    def count(self) -> Tensor:
        """[B] int64: how many real tokens the row has."""
        return (self.label >= 0).sum(1)

    @cached_property
    def together(self) -> Tensor:
        """[B, T, T] bool: query i may see key j: both real, of one document, and j <= i."""
        label = self.label
        same = (label[:, :, None] == label[:, None, :]) & (label >= 0)[:, :, None]
        return same.tril()

    def among(self, window: int | None = None) -> Tensor:
        """[B or 1, T, T] bool: which tokens of the call see each other, through a window if there is one."""
        return self.once(("among", window), lambda: self._among(window))  # type: ignore[no-any-return]

    def _among(self, window: int | None) -> Tensor:
        assert self.position is not None
        tokens, device = self.position.shape[1], self.position.device
        causal = torch.ones(1, tokens, tokens, dtype=torch.bool, device=device).tril()
        visible = causal if self.plain else self.together
        return visible if window is None else visible & ~causal.tril(-window)

    @property
    def apart(self) -> Tensor:
        """[B or 1, T, T] int64: how far each token stands behind each query."""
        assert self.position is not None
        return self.position[..., :, None] - self.position[..., None, :]

    def documents(self, batch: int) -> "Documents":
        """The real tokens of all documents, one document after the other."""
        assert self.position is not None
        return self.once("documents", lambda: _documents(self, batch))  # type: ignore[no-any-return]

    def ends(self, start: Tensor) -> Tensor:
        """[B] int64: tokens of the row's last document seen so far; `start` where the row is all padding."""
        assert self.position is not None
        if self.plain:
            return start + self.position.shape[1]
        last = (self.first + self.count - 1).clamp(min=0)[:, None]
        reached = self.position.expand_as(self.label).gather(1, last)[:, 0] + 1
        return torch.where(self.count > 0, reached, start)

    def furthest(self, reach: Tensor, length: Tensor) -> Tensor:
        """[B] int64: the most tokens of the row's last document ever seen, given those before this call."""
        if self.plain:
            return torch.maximum(reach, length)
        return torch.where(self.running[:, -1] == 0, torch.maximum(reach, length), length)

    def mask(self, y: Tensor) -> Tensor:
        """y [B, T, ...] with zeros at the padding."""
        if self.real is None:
            return y
        return y * self.real.reshape(*self.real.shape, *[1] * (y.dim() - 2)).to(y.dtype)

    def before(self, batch: int) -> Tensor:
        """[B] int64: tokens of the incoming document that a state has seen before this call."""
        assert self.start is not None
        return self.start.expand(batch)

    def slice(self, start: int, stop: int) -> "Segments":
        """The part [start, stop) of placed segments, as a call of its own that continues the part before it."""
        assert self.position is not None
        if start == 0 and stop >= self.position.shape[1]:
            return self
        return self.once(("slice", start, stop), lambda: self._slice(start, stop))  # type: ignore[no-any-return]

    def _slice(self, start: int, stop: int) -> "Segments":
        assert self.position is not None
        assert self.start is not None
        position = self.position[:, start:stop]
        bound = None if self.bound is None else self.bound + start
        if self.plain:
            return Segments(position=position, start=self.start + start, bound=bound)
        label, seen = self.label[:, start:stop], self.start
        incoming = torch.zeros_like(self.running[:, 0])
        if start:
            incoming, seen = self.running[:, start - 1], self.slice(0, start).ends(self.before(label.shape[0]))
        opening = torch.where(label >= 0, label, torch.iinfo(torch.int64).max).min(1).values
        return Segments(label >= 0, label, position, opening == incoming, seen, bound)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), computed once for all the layers that ask for `key` in this call."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _check(self, batch: int, tokens: int) -> None:
        shapes = {"real": (batch, tokens), "document": (batch, tokens), "carries": (batch,)}
        for name, shape in shapes.items():
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(f"segments.{name} has shape {tuple(value.shape)}; these tokens need {shape}")
            if name != "document" and value.dtype != torch.bool:
                raise ValueError(f"segments.{name} is {value.dtype}; make it torch.bool")
        if self.real is not None and tokens > 2 and bool(_holes(self.real).any()):
            raise ValueError(
                "segments.real has a hole: the real tokens of a row must be contiguous (pad left or right)"
            )


class Documents(NamedTuple):
    """N documents of a batch, `total` real tokens in all, without padding."""

    place: Tensor  # [total] int64, each token's place in the flattened [B * T]
    bounds: Tensor  # [N + 1] int64, document n is place[bounds[n] : bounds[n + 1]]
    row: Tensor  # [N] int64, the row it stands in
    incoming: Tensor  # [N] bool, whether it continues the row's state
    last: Tensor  # [B] int64, the row's last document; -1 in a row of padding

    def packed(self, x: Tensor) -> Tensor:
        """The real tokens of x [B, T, ...], [total, ...]."""
        return x.flatten(0, 1)[self.place]

    def spread(self, y: Tensor, batch: int, tokens: int) -> Tensor:
        """y [total, ...] back in its places, zeros at the padding, [batch, tokens, ...]."""
        flat = y.new_zeros(batch * tokens, *y.shape[1:]).index_copy(0, self.place, y)
        return flat.unflatten(0, (batch, tokens))  # type: ignore[no-any-return]


def _documents(segments: Segments, batch: int) -> Documents:
    assert segments.position is not None
    tokens, device = segments.position.shape[1], segments.position.device
    label = torch.zeros(batch, tokens, dtype=torch.int64, device=device) if segments.plain else segments.label
    begins = _begins(label)
    starts, place = begins.flatten().nonzero()[:, 0], (label >= 0).flatten().nonzero()[:, 0]
    rank = (label >= 0).flatten().cumsum(0) - 1
    bounds = torch.cat([rank[starts], rank.new_full((1,), place.numel())])
    row = starts // max(tokens, 1)
    last = torch.full((batch,), -1, device=device).scatter_reduce(0, row, torch.arange(len(row), device=device), "amax")
    return Documents(place, bounds, row, label.flatten()[starts] == 0, last)


def _holes(real: Tensor) -> Tensor:
    """[B] whether padding lies between a row's real tokens."""
    return real.long().diff(dim=1).abs().sum(1) + real[:, 0] + real[:, -1] > 2


def _begins(label: Tensor) -> Tensor:
    """[B, T] bool: the token is the first of a document of the call."""
    return (label >= 0) & (label != torch.nn.functional.pad(label, (1, 0), value=-1)[:, :-1])


def pack_mask(lengths: Tensor, tokens: int, left: bool = False) -> Tensor:
    """[B, tokens] bool for rows of `lengths` [B] real tokens, padded on the right (or the left)."""
    index = torch.arange(tokens, device=lengths.device)[None]
    return index >= tokens - lengths[:, None] if left else index < lengths[:, None]
