"""Going back exactly in any stack: crop, restore, and replay the tokens between."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..mixers.cached import written
from ..model import Stack
from ..segments import Segments, pack_mask
from ..state import Snapshots, StackState

Form = Callable[[Tensor, StackState, Segments | None], tuple[Tensor, StackState]]


class Tape:
    """Steps a model and remembers enough to go back: `state` is where it stands.

    Snapshots of what cannot be cropped are taken at most `every` tokens apart, and the newest `keep` are kept. A row
    that takes every token it is given can go back (keep - 1) * every + 1 of them, or to the start of its document.
    The snapshots take keep times the bytes of what cannot be cropped, the tokens 8 * keep * every bytes a row.
    Windowed caches are cropped if their state was made with init_state(rollback=keep * every) or more, else kept whole.

    After `rollback` the state is what the same tokens had given in one chunkwise call after the snapshot, to the bit
    where all rows go back by the same number, and to rounding however else they were taken.
    """

    def __init__(self, model: Stack, state: StackState, every: int = 64, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every = {every} or keep = {keep} is too small: give 1 or more")
        self.model, self.state, self.every, self.keep = model, state, every, keep
        self.snapshots = Snapshots(keep, keep * every)
        self.since = 0  # the most tokens that a row has taken since the newest snapshot
        self.tokens = torch.zeros(state.batch, keep * every, dtype=torch.int64, device=state.length.device)

    def nbytes(self) -> int:
        """Bytes beside the state's own."""
        return self.snapshots.nbytes() + self.tokens.numel() * self.tokens.element_size()

    def chunkwise(self, tokens: Tensor, segments: Segments | None = None) -> Tensor:
        """Logits [B, T, V] of T tokens more, taken in parts of at most `every` (before those, what none goes back to).

        Raises ValueError where the state has no room for them.
        """
        return self._run(tokens, segments, self.model.chunkwise)

    def recurrent(self, tokens: Tensor, segments: Segments | None = None) -> Tensor:
        """Logits [B, 1, V] of one token more, tokens [B, 1]."""
        return self._run(tokens, segments, self.model.recurrent)

    def rollback(self, tokens: int | Tensor) -> None:
        """Forget the last `tokens` tokens of each row (one number, or [B]); rows of 0 stay as they are to the bit.

        Raises ValueError, and changes nothing, where a row cannot go back so far.
        """
        length = self.state.shortened(tokens)
        moved = length < self.state.length
        if all(layer.rewindable(self.state.behind(length)) for layer in self.state.layers):
            self.state = self.state.cropped(length)
            self.snapshots.forget(length)
        else:
            self._check_reach(length, moved)
            self.snapshots.forget(length)
            self.state = self.snapshots.restored(self.state, moved)
            self._replay(length)
        self.since = self.snapshots.since(self.state)

    def _run(self, tokens: Tensor, segments: Segments | None, form: Form) -> Tensor:
        if tokens.shape[1] == 0:
            return form(tokens, self.state, segments)[0]
        placed = (segments or Segments()).placed(self.state.length, tokens.shape[1], self.state.bound)
        self.model.room(self.state, placed, tokens.shape[1])
        parts = self._parts(tokens.shape[1])
        return torch.cat([self._take(tokens[:, a:b], placed.slice(a, b), form) for a, b in parts], 1)

    def _parts(self, tokens: int) -> Iterator[tuple[int, int]]:
        first = max(0, tokens - self.keep * self.every)
        if first:
            yield 0, first
        for start in range(first, tokens, self.every):
            yield start, min(tokens, start + self.every)

    def _take(self, tokens: Tensor, placed: Segments, form: Form) -> Tensor:
        count = tokens.shape[1]
        if count > self.every:
            self.snapshots.clear()
        elif not self.snapshots or self.since + count > self.every:
            self.snapshots.take(self.state)
            self.since = 0
        if not placed.plain:
            self.snapshots.begin((placed.running[:, -1] > 0).nonzero()[:, 0])
        self.tokens = written(self.tokens, tokens, placed)
        self.since += count
        free = None if placed.plain else Segments(placed.real, placed.document, carries=placed.carries)
        logits, self.state = form(tokens, self.state, free)
        return logits

    def _check_reach(self, length: Tensor, moved: Tensor) -> None:
        floor = self.snapshots.floor(self.state)
        if bool((moved & (length < floor)).any()):
            raise ValueError(
                f"cannot go back to {length.tolist()} tokens: this Tape can go back to {floor.tolist()}; "
                f"make it with a larger keep (now {self.keep}) or every (now {self.every})"
            )

    def _replay(self, length: Tensor) -> None:
        """Take again the tokens from where the state stands up to `length` [B]."""
        start = self.state.length
        left = length - start
        count = int(left.max())
        if count == 0:
            return
        slots = (start[:, None] + torch.arange(count, device=start.device)) % self.tokens.shape[1]
        real = None if bool((left == count).all()) else pack_mask(left, count)
        segments = None if real is None else Segments(real=real)
        _, self.state = self.model.chunkwise(self.tokens.gather(1, slots), self.state, segments, at=slots[:, :0])
