"""Tokens to text as they come: what a decoder of `tokenizers` makes of a whole list, made token by token.

The library's own DecodeStream fails where bytes are no character, and keeps back what is incomplete at the end.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

RUN = 128
"""Bytes of a byte fallback's run that are kept back at most, until it ends and is known to be UTF-8."""

CONTEXT = 8
"""Tokens of a prompt that say how its continuation is read: half characters, spaces before words."""

LOST = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_FUSING = {"Fuse", "ByteLevel"}
_OF_PAIRS = {"BPEDecoder", "CTC", "Metaspace", "Replace", "WordPiece"}


class Piece(NamedTuple):
    """Text, and where in it each of the tokens begins whose place is now known, in their order.

    A place may lie behind the text: that of a token whose character is not complete.
    """

    text: str
    starts: tuple[int, ...]


class Detokenizer(Protocol):
    """Ids of one text in, pieces of it out; joined, they are the text, without half a character."""

    def put(self, token: int) -> Piece: ...

    def settle(self) -> None:
        """What was put is a prompt, whose text is said: of it, only half a character belongs to what follows."""

    def end(self) -> Piece:
        """What was kept back for tokens that will not come."""


def gone_on(detokenizer: Detokenizer, before: Sequence[int]) -> Detokenizer:
    """The same, for a text that goes on from the ids `before`."""
    for token in before[-CONTEXT:]:
        detokenizer.put(token)
    if before:
        detokenizer.settle()
    return detokenizer


class Bytes:
    """Bytes as UTF-8; each longest part that is none becomes U+FFFD, as in Python and in the library."""

    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, data: bytes, count: int) -> Piece:
        """`count` tokens begin with these bytes: at the character which the first byte is a part of."""
        opened = self.utf8.getstate()[0] + data[:1]
        start = max(0, len(opened.decode(errors="replace")) - 1)
        return Piece(self.utf8.decode(data), (start,) * count)

    def end(self) -> Piece:
        return Piece(self.utf8.decode(b"", final=True), ())


class ByteDetokenizer:
    """A token is a byte; what is none becomes U+FFFD."""

    def __init__(self) -> None:
        self.bytes = Bytes()

    def put(self, token: int) -> Piece:
        return self.bytes.put(bytes([token if token < 256 else 0xFF]), 1)

    def settle(self) -> None:
        """Nothing: all but half a character was said."""

    def end(self) -> Piece:
        return self.bytes.end()


class Stage(Protocol):
    """One decoder of a sequence: pieces in, those that are settled out."""

    def put(self, piece: Piece) -> Iterable[Piece]: ...

    def settle(self) -> None: ...

    def end(self) -> Iterable[Piece]: ...


class StagedDetokenizer:
    """The decoders of a tokenizer.json one after the other. word_of: a token's own text, None where it is not shown."""

    def __init__(self, word_of: Callable[[int], str | None], decoder: Any) -> None:
        self.word_of, self.stages = word_of, stages_of(decoder)
        self.unplaced = 0  # tokens without text, which stand where the next one does

    def put(self, token: int) -> Piece:
        self.unplaced += 1
        word = self.word_of(token)
        if word is None:
            return Piece("", ())
        pieces: list[Piece] = [Piece(word, (0,) * self.unplaced)]
        self.unplaced = 0
        for stage in self.stages:
            pieces = [settled for piece in pieces for settled in stage.put(piece)]
        return _joined(pieces)

    def settle(self) -> None:
        self.unplaced = 0
        for stage in self.stages:
            stage.settle()

    def end(self) -> Piece:
        pieces: list[Piece] = []
        for stage in self.stages:
            pieces = [*(settled for piece in pieces for settled in stage.put(piece)), *stage.end()]
        text, starts = _joined(pieces)
        return Piece(text, (*starts, *(len(text),) * self.unplaced))


def stages_of(decoder: Any) -> list[Stage]:
    """The decoder of a tokenizer.json as stages; none at all puts spaces between the tokens."""
    if decoder is None:
        return [Pairs(" ".join)]
    parts, stages, fused = _flat(json.loads(decoder.__getstate__())), list[Stage](), False
    for index, part in enumerate(parts):
        kind = part["type"]
        if kind == "Strip":
            stages.append(Strip(part["content"], part["start"], part["stop"], fused))
        elif fused and kind != "Fuse":
            return [*stages, Whole(_decoder_of(parts[index:]), fused)]
        elif kind == "ByteFallback":
            stages.append(Runs())
        elif kind == "ByteLevel":
            stages.append(ByteLevel())
        elif kind in _OF_PAIRS:
            stages.append(Pairs(_decoder_of([part])))
        elif kind != "Fuse":
            return [*stages, Whole(_decoder_of(parts[index:]), fused)]
        fused |= kind in _FUSING
    return stages


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The decoders of a sequence, and of those in it."""
    return [one for inner in part["decoders"] for one in _flat(inner)] if part["type"] == "Sequence" else [part]


def _decoder_of(parts: list[dict[str, Any]]) -> Callable[[Sequence[str]], str]:
    """The library's decoder of these parts."""
    from tokenizers import decoders  # noqa: PLC0415 - most stacks speak bytes

    decoder: Any = decoders.Sequence([])
    decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": parts}).encode())
    return lambda words: decoder.decode(list(words))


def _joined(pieces: list[Piece]) -> Piece:
    text, starts = "", list[int]()
    for piece in pieces:
        starts += [len(text) + start for start in piece.starts]
        text += piece.text
    return Piece(text, tuple(starts))


class Pairs:
    """A decoder that looks at a token, at the one before it, and at whether it is the first."""

    def __init__(self, decode: Callable[[Sequence[str]], str]) -> None:
        self.decode, self.before = decode, list[str]()

    def put(self, piece: Piece) -> list[Piece]:
        said = self.decode(self.before) if self.before else ""
        text = self.decode([*self.before, piece.text])[len(said) :]
        self.before = [piece.text]
        return [Piece(text, piece.starts)]

    def settle(self) -> None:
        """Nothing is kept back."""

    def end(self) -> list[Piece]:
        return []


class Strip:
    """Takes up to `start` and `stop` times `content` off the ends of each token, or of the whole text once fused."""

    def __init__(self, content: str, start: int, stop: int, fused: bool) -> None:
        self.content, self.start, self.stop, self.fused = content, start, stop, fused
        self.left, self.held = start, ""

    def put(self, piece: Piece) -> list[Piece]:
        if not self.fused:
            self.left, self.held = self.start, ""
        text = piece.text
        cut = min(self.left, len(text) - len(text.lstrip(self.content)))
        self.left = self.left - cut if cut == len(text) else 0
        starts = tuple(max(0, start - cut) + len(self.held) for start in piece.starts)
        text = self.held + text[cut:]
        kept = min(self.stop, len(text) - len(text.rstrip(self.content)))
        self.held = text[len(text) - kept :]
        return [Piece(text[: len(text) - kept], starts)]

    def settle(self) -> None:
        self.held = ""

    def end(self) -> list[Piece]:
        return []


class ByteLevel:
    """Letters that stand for bytes; a token with another letter stands for itself."""

    def __init__(self) -> None:
        self.bytes = Bytes()

    def put(self, piece: Piece) -> list[Piece]:
        known = all(letter in BYTE_OF_LETTER for letter in piece.text)
        data = bytes(BYTE_OF_LETTER[letter] for letter in piece.text) if known else piece.text.encode()
        return [self.bytes.put(data, len(piece.starts))]

    def settle(self) -> None:
        """Nothing: all but half a character was said."""

    def end(self) -> list[Piece]:
        return [self.bytes.end()]


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters: printable characters of Latin-1 are themselves, the other bytes are letters from U+0100 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


class Runs:
    """ByteFallback: a run of tokens <0x00> to <0xFF> is UTF-8 as a whole, or each of its bytes becomes U+FFFD.

    So nothing of a run can be said before it ends or is broken; of one that is longer than RUN, whole characters are,
    and stay what they are.
    """

    def __init__(self) -> None:
        self.tail = b""  # the run's last three bytes
        self._begin(b"")

    def _begin(self, half: bytes) -> None:
        """Begin a run with half a character."""
        self.utf8, self.broken = codecs.getincrementaldecoder("utf-8")(), False
        self.utf8.decode(half)
        self.kept = [(byte, 0) for byte in half]  # bytes that are not said, and how many tokens begin there
        self.tail = half

    def put(self, piece: Piece) -> list[Piece]:
        if not _BYTE.fullmatch(piece.text):
            return [*self.end(), piece]
        byte = int(piece.text[3:5], 16)
        self.kept.append((byte, len(piece.starts)))
        self.tail = self.tail[-2:] + bytes([byte])
        self.broken = self.broken or not _goes_on(self.utf8, byte)
        if self.broken:
            return self._lost()
        return [self._whole()] if len(self.kept) > RUN else []

    def settle(self) -> None:
        """Also where the run was broken, its last bytes may begin a character that comes to an end."""
        self._begin(next((half for n in (3, 2, 1) if _is_half(half := self.tail[-n:])), b""))

    def end(self) -> list[Piece]:
        pieces = self._lost() if self.broken or self.utf8.getstate()[0] else [self._whole()] if self.kept else []
        self._begin(b"")
        return pieces

    def _lost(self) -> list[Piece]:
        kept, self.kept = self.kept, []
        return [Piece(LOST, (0,) * count) for _, count in kept]

    def _whole(self) -> Piece:
        """The characters that are complete."""
        end = len(self.kept) - len(self.utf8.getstate()[0])
        said, self.kept = self.kept[:end], self.kept[end:]
        starts, at = list[int](), -1
        for byte, count in said:
            at += byte & 0xC0 != 0x80
            starts += [at] * count
        return Piece(bytes(byte for byte, _ in said).decode(), tuple(starts))


def _goes_on(utf8: codecs.IncrementalDecoder, byte: int) -> bool:
    """Whether the bytes before this one go on with it to be UTF-8."""
    try:
        utf8.decode(bytes([byte]))
    except UnicodeDecodeError:
        return False
    return True


def _is_half(data: bytes) -> bool:
    """Whether this is the beginning of one character, and not all of it."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    return bool(data) and all(_goes_on(utf8, byte) for byte in data) and utf8.getstate()[0] == data


class Whole:
    """A decoder of which nothing can be said before the last token: the text comes at the end."""

    def __init__(self, decode: Callable[[Sequence[str]], str], fused: bool) -> None:
        self.decode, self.fused = decode, fused
        self.words, self.starts, self.length, self.said = list[str](), list[int](), 0, 0

    def put(self, piece: Piece) -> list[Piece]:
        self.words.append(piece.text)
        self.starts += [self.length + start for start in piece.starts]
        self.length += len(piece.text)
        return []

    def settle(self) -> None:
        self.said, self.starts = len(self._text()), []

    def end(self) -> list[Piece]:
        text = self._text()[self.said :]
        return [Piece(text, tuple(min(max(0, start - self.said), len(text)) for start in self.starts))]

    def _text(self) -> str:
        return self.decode(["".join(self.words)] if self.fused else self.words)
