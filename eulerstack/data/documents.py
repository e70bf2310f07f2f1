"""Files to documents: a text file is one, and so is each line of a .jsonl file, and each row of a table."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..tokens import Tokenizer, document_ids
from .tables import TABLES, table_pieces, table_rows

Some = TypeVar("Some")


@dataclass(frozen=True)
class TextFile:
    """Its name in the corpus, its place, and the hash of its bytes."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Document:
    """A text to learn from. After a prompt, the prompt's tokens are read and are no targets."""

    name: str
    text: str
    prompt: str | None = None

    def tokens(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """The ids, and how many of the first are no targets. Prompt and text are tokenised apart, as in `generate`."""
        ids = document_ids(tokenizer, self.text)
        if self.prompt is None:
            return ids, 0
        given = tokenizer.encode(self.prompt)
        return [*given, *ids[int(tokenizer.begins) :]], len(given)


@dataclass(frozen=True)
class Piece:
    """A part of a file that is read at once: from `begin` to `end`, whose first line or row has the number `first`.

    In bytes of a .jsonl file, and in row groups of Parquet or rows of Arrow; `size` is how many bytes it has, or about.
    """

    file: TextFile
    begin: int
    end: int
    first: int
    size: int


@dataclass(frozen=True)
class Found:
    """A piece's documents; what is wrong with the first line or row that is none, and how many such there are."""

    documents: list[Document]
    bad: int = 0
    first_bad: str = ""


def pieces(file: TextFile, size: int) -> list[Piece]:
    """The file in pieces of about `size` bytes, by what it holds. Raises ValueError for a damaged table."""
    if file.path.suffix in TABLES:
        return [Piece(file, *place) for place in table_pieces(file.path, size)]
    if file.path.suffix == ".jsonl":
        return list(_line_pieces(file, size))
    length = file.path.stat().st_size
    return [Piece(file, 0, length, 1, length)]


def read(piece: Piece, text_key: str) -> Found:
    """The documents of a piece. Raises ValueError for text that is no UTF-8."""
    name = piece.file.name
    if piece.file.path.suffix in TABLES:
        rows = table_rows(piece.file.path, piece.begin, piece.end, (text_key, "prompt", "completion"))
        return _found(enumerate(rows, piece.first), lambda n, row: _of(f"{name}:{n}", row, text_key), "row")
    if piece.file.path.suffix == ".jsonl":
        lines = enumerate(_lines(piece), piece.first)
        full = ((number, line) for number, line in lines if line.strip())
        return _found(full, lambda n, line: _of(f"{name}:{n}", _object(line), text_key), "line")
    return Found([Document(name, _text(piece.file))])


def _found(numbered: Iterable[tuple[int, Some]], made: Callable[[int, Some], Document], word: str) -> Found:
    documents: list[Document] = []
    bad: list[str] = []
    for number, one in numbered:
        try:
            documents.append(made(number, one))
        except ValueError as error:
            bad.append(f"{word} {number}: {error}")
    return Found(documents, len(bad), bad[0] if bad else "")


def skipped(file: TextFile, count: int, bad: int, first_bad: str, text_key: str) -> list[str]:
    """A sentence on a file's lines or rows that are no documents. Raises ValueError where none is one."""
    word = "row" if file.path.suffix in TABLES else "line"
    if not count:
        first = f"; first at {first_bad}" if bad else ""
        keys = "give it columns" if word == "row" else "write an object a line,"
        raise ValueError(
            f"{file.path} has no {word} to train on{first}; "
            f'{keys} {{"{text_key}": "..."}} or {{"prompt": "...", "completion": "..."}}'
        )
    return [f"skipped {bad:,} of {count + bad:,} {word}s of {file.path}: first at {first_bad}"] if bad else []


def _text(file: TextFile) -> str:
    try:
        text = file.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.path} is no UTF-8 text ({error.reason} at byte {error.start}); remove it from data.path"
        ) from None
    return text


def _line_pieces(file: TextFile, size: int) -> Iterator[Piece]:
    """Whole lines, and the number of each piece's first."""
    begin, first = 0, 1
    with file.path.open("rb") as data:
        while some := data.read(size):
            some += data.readline()
            yield Piece(file, begin, begin + len(some), first, len(some))
            begin, first = begin + len(some), first + some.count(b"\n")


def _lines(piece: Piece) -> list[bytes]:
    with piece.file.path.open("rb") as data:
        data.seek(piece.begin)
        return data.read(piece.end - piece.begin).split(b"\n")


def _of(name: str, found: dict[str, object], text_key: str) -> Document:
    """Raises ValueError that says what is wrong with the line or row."""
    if text_key in found:
        return Document(name, _string(found, text_key))
    if "prompt" in found and "completion" in found:
        return Document(name, _string(found, "completion"), _string(found, "prompt", empty=True))
    raise ValueError(f"it has no key {text_key!r}, nor prompt and completion (data.text_key names another key)")


def _object(line: bytes) -> dict[str, object]:
    try:
        found: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8 text") from None
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _string(found: dict[str, object], key: str, empty: bool = False) -> str:
    value = found[key]
    if not isinstance(value, str):
        raise ValueError(f"its {key!r} is no string")
    if not value and not empty:
        raise ValueError(f"its {key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its {key!r} holds half a character (a lone surrogate)") from None
    return value
