"""Documents to tokens, a part of the corpus at a time: by several processes, and without loss when one is killed."""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..disk import write_whole
from ..tokens import Tokenizer
from .documents import Document, Piece, TextFile, pieces, read
from .splits import TRAIN, is_held

PART = 1 << 24
"""Bytes of text that are tokenised at once, and lost when a run is killed meanwhile."""


@dataclass(frozen=True)
class Part:
    """What one part's documents became, in order. Bytes and lengths are a document each.

    text: of the documents that may be held out, end to end: those whose names say so, and the last.
    """

    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    held: npt.NDArray[np.bool_]
    text: npt.NDArray[np.uint8]
    bad: list[tuple[int, int, int, str]]  # a piece each: its file's number, documents, what is none, the first of that


@dataclass(frozen=True)
class Parts:
    """A corpus as parts in a folder, each a file of its own: whole, or not there.

    The zip's checksums tell a damaged one. What they hold is the same however many processes made them.
    """

    folder: Path
    files: list[TextFile]
    plan: list[list[tuple[int, Piece]]]  # each piece with its file's number
    tokenizer: Tokenizer
    held_out: float
    text_key: str

    @staticmethod
    def of(folder: Path, files: list[TextFile], tokenizer: Tokenizer, held_out: float, text_key: str) -> "Parts":
        return Parts(folder / str(PART), files, _planned(files, PART), tokenizer, held_out, text_key)

    def make(self, processes: int) -> None:
        """Make those that are not there. Raises ValueError for what cannot be read, OSError for a full disk."""
        todo = [number for number in range(len(self.plan)) if self.get(number) is None]
        for number in todo:
            self._place(number).unlink(missing_ok=True)
        failed = _by_processes(self, todo, processes) if processes > 1 and len(todo) > 1 else []
        # what went wrong elsewhere is tried again here, where it can be said
        todo = [*failed, *(n for n in todo if n not in failed and not self._place(n).is_file())]
        for number in tqdm(todo, "tokenising", disable=not sys.stderr.isatty(), leave=False):
            self.write(number)

    def write(self, number: int) -> None:
        part = self._made(number)
        arrays = {name: value for name, value in vars(part).items() if name != "bad"}
        notes = np.frombuffer(json.dumps(part.bad).encode(), dtype=np.uint8)
        write_whole(self._place(number), lambda data: np.savez(data, notes=notes, **arrays))

    def get(self, number: int) -> Part | None:
        """None where it was not made, or is damaged."""
        try:
            with self._place(number).open("rb") as file, np.load(file) as found:
                arrays = {name: found[name] for name in found}
            return Part(bad=[tuple(one) for one in json.loads(arrays.pop("notes").tobytes())], **arrays)
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            return None

    def __iter__(self) -> Iterator[Part]:
        for number in range(len(self.plan)):
            part = self.get(number)
            if part is None:
                raise OSError(f"{self._place(number)}, just written, does not read back: is the disk full or broken?")
            yield part

    def _place(self, number: int) -> Path:
        return self.folder / f"{number:06}.npz"

    def _made(self, number: int) -> Part:
        found = [(file, read(piece, self.text_key)) for file, piece in self.plan[number]]
        documents = [document for _, one in found for document in one.documents]
        ids = [_tokens(document, self.tokenizer) for document in documents]
        texts = [document.text.encode() for document in documents]
        held = np.array([self._held(file, one) for file, some in found for one in some.documents], dtype=np.bool_)
        dtype = np.min_scalar_type(self.tokenizer.vocab_size - 1)
        some = [text for text, one, last in zip(texts, held, _last(len(texts)), strict=True) if one or last]
        return Part(
            np.concatenate([np.asarray(one, dtype=dtype) for one, _ in ids] or [np.empty(0, dtype=dtype)]),
            np.array([len(one) for one, _ in ids], dtype=np.int64),
            np.array([count for _, count in ids], dtype=np.int64),
            np.array([len(text) for text in texts], dtype=np.int64),
            held,
            np.frombuffer(b"".join(some), dtype=np.uint8),
            [(file, len(one.documents), one.bad, one.first_bad) for file, one in found],
        )

    def _held(self, file: int, document: Document) -> bool:
        split = self.files[file].split
        return is_held(document.name, self.held_out) if split is None else split != TRAIN


def _tokens(document: Document, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The document's. Raises ValueError that names it where the tokenizer cannot encode it."""
    try:
        return document.tokens(tokenizer)
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from None


def _last(count: int) -> Iterator[bool]:
    return (index == count - 1 for index in range(count))


def _planned(files: list[TextFile], size: int) -> list[list[tuple[int, Piece]]]:
    """Pieces of files, in order, in parts of about `size` bytes."""
    plan: list[list[tuple[int, Piece]]] = [[]]
    filled = 0
    for number, file in enumerate(files):
        for piece in pieces(file, size):
            if filled and filled + piece.size > size:
                plan.append([])
                filled = 0
            plan[-1].append((number, piece))
            filled += piece.size
    return plan


def _by_processes(parts: Parts, todo: list[int], count: int) -> list[int]:
    """Parts shared by processes in turn. Returns the number of one that could not be made, if there is any.

    They share nothing that a process which is killed could leave locked, and end with the one that started them.
    """
    context: Any = multiprocessing.get_context("fork")
    failed = context.Value("q", -1, lock=False)
    workers = [context.Process(target=_work, args=(parts, todo[i::count], failed, os.getpid())) for i in range(count)]
    for worker in workers:
        worker.start()
    _await(workers)
    return [] if failed.value < 0 else [failed.value]


def _await(workers: list[BaseProcess]) -> None:
    """Until all have ended, or one that failed."""
    try:
        while running := [worker for worker in workers if worker.is_alive()]:
            wait([worker.sentinel for worker in running])
            if any(worker.exitcode for worker in workers):
                break
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(parts: Parts, numbers: list[int], failed: Any, parent: int) -> None:
    for number in numbers:
        if os.getppid() != parent:
            os._exit(1)
        try:
            parts.write(number)
        except Exception:
            failed.value = number
            os._exit(1)  # silently: the parent tries it again, and says what happens
    os._exit(0)
