"""Files to documents: a text file is one, and so is each line of a .jsonl file."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..tokens import Tokenizer, document_ids


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


def read(files: list[TextFile], text_key: str) -> tuple[list[Document], list[str]]:
    """The documents of all files, and a sentence for each file with lines that were skipped."""
    documents: list[Document] = []
    skipped: list[str] = []
    for file in files:
        if file.path.suffix == ".jsonl":
            found, sentence = _lines(file, text_key)
            documents += found
            skipped += sentence
        else:
            documents.append(Document(file.name, _text(file)))
    return documents, skipped


def _text(file: TextFile) -> str:
    try:
        text = file.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.path} is no UTF-8 text ({error.reason} at byte {error.start}); remove it from data.path"
        ) from None
    return text


def _lines(file: TextFile, text_key: str) -> tuple[list[Document], list[str]]:
    """A .jsonl file's documents, and a sentence on the lines that are none. Blank lines count for nothing.

    Raises ValueError where no line can be used.
    """
    documents: list[Document] = []
    bad: list[str] = []
    for number, line in enumerate(file.path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            documents.append(_document(f"{file.name}:{number}", line, text_key))
        except ValueError as error:
            bad.append(f"line {number}: {error}")
    if not documents:
        first = f"; first at {bad[0]}" if bad else ""
        raise ValueError(
            f"{file.path} has no line to train on{first}; "
            f'write an object a line, {{"{text_key}": "..."}} or {{"prompt": "...", "completion": "..."}}'
        )
    total = len(documents) + len(bad)
    return documents, [f"skipped {len(bad):,} of {total:,} lines of {file.path}: first at {bad[0]}"] if bad else []


def _document(name: str, line: bytes, text_key: str) -> Document:
    """Raises ValueError that says what is wrong with the line."""
    found = _object(line)
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
