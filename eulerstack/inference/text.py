"""Tokens as text: what one answer says as its tokens come, and where in the text each of them stands."""

from collections.abc import Iterable, Sequence

from ..detokenizer import Piece
from ..tokens import Cut, Tokenizer


class Text:
    """The text of a growing row of tokens that goes on from `before`: whole characters, up to the first of the `stops`.

    offsets: where tokens stand in the text, in characters, in their order; pieces of one character share a place. The
    last of them are not there yet where what comes next decides.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self.detokenizer, self.cut = tokenizer.detokenizer(before), Cut(stops)
        self.length, self.offsets = 0, list[int]()

    def read(self, tokens: Iterable[int]) -> str:
        """Text in which no stop is looked for."""
        return "".join(self._placed(self.detokenizer.put(token)) for token in tokens)

    def add(self, token: int) -> str:
        """What can be shown of an answer now that `token` came."""
        return self.cut(self._placed(self.detokenizer.put(token)))

    def end(self) -> str:
        """What was held back for tokens that will not come."""
        return self.cut(self._placed(self.detokenizer.end())) + self.cut.held

    def _placed(self, piece: Piece) -> str:
        self.offsets += [self.length + start for start in piece.starts]
        self.length += len(piece.text)
        return piece.text
