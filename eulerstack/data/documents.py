"""Files to documents: a text file is one, and so is each line of a .jsonl file, and each row of a table."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..tokens import Tokenizer, document_ids
from .names import LINES, TABLES, shown, suffix_of
from .tables import table_pieces, table_rows

MARK = codecs.BOM_UTF8
"""What some editors put before UTF-8; it is none of the text."""

_MARKS_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Some = TypeVar("Some")


@dataclass(frozen=True)
class TextFile:
    """Its name in the corpus, its place, the hash of its bytes, and when and how long they were as it was taken.

    split: as in `name_splits`. Raises ValueError, and no OSError, where it cannot be read.
    """

    name: str
    path: Path
    digest: str
    stamp: tuple[int, int]
    split: str | None = None

    @staticmethod
    def of(path: Path, name: str, split: str | None = None) -> "TextFile":
        with reading(path):
            return TextFile(name, path, digest_of(path), _stamp(path), split)

    def check_unchanged(self) -> None:
        """Raises ValueError where the file is no longer what was hashed."""
        with reading(self.path):
            if _stamp(self.path) != self.stamp:
                raise ValueError(f"{shown(self.path)} was changed while it was read: start again when it is written")


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises ValueError, with the file's name, where the system does not give it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{shown(path)} cannot be read: {error.strerror or error}; make it readable, or remove it"
        ) from None


def is_empty(path: Path) -> bool:
    """Whether there is no text in the file: no byte, or the mark of UTF-8 alone."""
    with reading(path), path.open("rb") as file:
        return file.read(len(MARK) + 1) in (b"", MARK)


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
    """The file in pieces of about `size` bytes, by what it holds. Raises ValueError for a damaged table, and UTF-16."""
    kind = suffix_of(file.path)
    with reading(file.path):
        if kind in TABLES:
            return [Piece(file, *place) for place in table_pieces(file.path, size)]
        _check_mark(file.path)
        if kind in LINES:
            return list(_line_pieces(file, size))
        length = file.path.stat().st_size
    return [Piece(file, 0, length, 1, length)]


def read(piece: Piece, text_key: str) -> Found:
    """The documents of a piece. Raises ValueError for text that is no UTF-8."""
    name, kind = piece.file.name, suffix_of(piece.file.path)
    if kind in TABLES:
        rows = table_rows(piece.file.path, piece.begin, piece.end, (text_key, "prompt", "completion"))
        return _found(enumerate(rows, piece.first), lambda n, row: _of(f"{name}:{n}", row, text_key), "row")
    with reading(piece.file.path):
        if kind not in LINES:
            return Found([Document(name, _whole(piece.file, text_key))])
        lines = enumerate(_lines(piece), piece.first)
    full = ((number, line) for number, line in lines if line.removeprefix(MARK).strip())
    return _found(full, lambda n, line: _of(f"{name}:{n}", _object(line), text_key), "line")


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
    word = "row" if suffix_of(file.path) in TABLES else "line"
    if not count:
        first = f"; first at {first_bad}" if bad else ""
        keys = "give it columns" if word == "row" else "write an object a line,"
        raise ValueError(
            f"{shown(file.path)} has no {word} to train on{first}; "
            f'{keys} {{"{text_key}": "..."}} or {{"prompt": "...", "completion": "..."}}'
        )
    return [f"skipped {bad:,} of {count + bad:,} {word}s of {shown(file.path)}: first at {first_bad}"] if bad else []


def _check_mark(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(4)
    for marks, name in (((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"), (_MARKS_16, "UTF-16")):
        if begin.startswith(marks):
            raise ValueError(f"{shown(path)} is no UTF-8 text but {name}: save it as UTF-8 (iconv -f {name} -t UTF-8)")


def _whole(file: TextFile, text_key: str) -> str:
    """Raises ValueError for rows in a .json file, which would be learned with their braces and keys."""
    text = _text(file)
    if suffix_of(file.path) == ".json" and _is_row(text.lstrip().removeprefix("[").lstrip(), text_key):
        raise ValueError(
            f'{shown(file.path)} holds rows such as {{"{text_key}": ...}}: write an object a line and name it .jsonl; '
            "to learn JSON as it stands, name it .txt"
        )
    return text


def _is_row(text: str, text_key: str) -> bool:
    """Whether JSON begins with an object that would be a document."""
    try:
        first, _ = json.JSONDecoder().raw_decode(text)
        return isinstance(first, dict) and bool(_of("", first, text_key))
    except (ValueError, RecursionError):
        return False


def _text(file: TextFile) -> str:
    try:
        return file.path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(file.path)} is no UTF-8 text ({error.reason} at byte {error.start}); remove it from data.path"
        ) from None


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
