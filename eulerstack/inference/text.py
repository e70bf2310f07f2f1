"""Tokens as text: what one answer says as its tokens come, and where in the text each of them stands."""

from collections import deque
from collections.abc import Iterable, Sequence

from ..tokens import Cut, Tokenizer

CONTEXT = 8
"""Tokens of a prompt that say how its continuation is read: half characters, spaces before words."""


class Text:
    """The text of a growing row of tokens: whole characters, up to the first of the `stops`.

    offset: where the last token stands in the text, in characters; pieces of one character share a place.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.cut = tokenizer, Cut(stops)
        self.feed: deque[int | None] = deque()
        self.pieces = tokenizer.stream(iter(self.feed.popleft, None))
        self.length = self.offset = 0
        self.open: list[int] = []

    def read(self, tokens: Iterable[int], count: bool = True) -> tuple[str, list[int]]:
        """The text of a prompt, in which no stop is looked for, and each token's offset; both left out uncounted."""
        pieces, offsets = [], []
        for token in tokens:
            pieces.append(self._next(token))
            offsets.append(self.offset)
        if not count:
            self.length = 0
        return "".join(pieces), offsets

    def add(self, token: int) -> str:
        """What can be shown of an answer now that `token` came."""
        return self.cut(self._next(token))

    def end(self) -> str:
        """What was held back for tokens that will not come."""
        self.feed.append(None)
        return self.cut("".join(self.pieces)) + self.cut.held

    def _next(self, token: int) -> str:
        self.feed.append(token)
        piece = next(self.pieces)
        alone = self.tokenizer.decode([token])
        held, together = self.tokenizer.decode(self.open), self.tokenizer.decode([*self.open, token])
        whole = held if together == held + alone else held.rstrip("\N{REPLACEMENT CHARACTER}")
        self.offset = self.length + len(whole)
        self.length += len(piece)
        if piece:
            self.open = [token] if len(piece) < len(together) else []
        else:
            self.open = [*self.open, token] if together else []
        return piece
