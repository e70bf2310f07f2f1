"""Text to memory-mapped token shards: files listed and hashed, documents split by name and tokenised once."""

import gzip
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..tokens import Tokenizer
from .documents import Document, TextFile, read

SPLITS = ("train", "held_out")
FORMAT = 3
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "dist-packages"}


Named = TypeVar("Named", TextFile, Document)


def standard_library() -> list[TextFile]:
    """Python's own standard-library sources on this machine, without their tests: the embedded corpus."""
    return list_files(Path(sysconfig.get_path("stdlib")), "*.py", skip=_SKIPPED)


def list_files(root: Path, pattern: str = "*", skip: set[str] | None = None) -> list[TextFile]:
    """The files of a folder in sorted order, or the one file. Raises ValueError where there is no text."""
    if Path(pattern).is_absolute():
        raise ValueError(f"data.pattern = {pattern!r} must be relative, such as '*.txt'")
    if root.is_file():
        if not root.stat().st_size:
            raise ValueError(f"data.path = {str(root)!r} is an empty file; give text to train on")
        return [_listed(root, root.name)]
    if not root.is_dir():
        raise ValueError(f"data.path = {str(root)!r} is no file and no folder; give text to train on")
    paths = sorted(p for p in root.rglob(pattern) if p.is_file() and not _hidden(p.relative_to(root), skip or set()))
    files = [_listed(p, p.relative_to(root).as_posix()) for p in paths if p.stat().st_size]
    if not files:
        raise ValueError(f"data.path = {str(root)!r} holds no files with text in them")
    return files


def _hidden(name: Path, skip: set[str]) -> bool:
    return any(part in skip or part.startswith(".") for part in name.parts)


def _listed(path: Path, name: str) -> TextFile:
    return TextFile(name, path, hashlib.sha256(path.read_bytes()).hexdigest())


def split_by_name(all_of: list[Named], held_out: float) -> dict[str, list[Named]]:
    """What is held out is chosen by the hash of its name, so that adding documents moves no other."""
    chosen = [int(hashlib.sha256(one.name.encode()).hexdigest()[:8], 16) < held_out * 2**32 for one in all_of]
    if len(all_of) > 1 and not any(chosen):
        chosen[-1] = True
    if len(all_of) > 1 and all(chosen):
        chosen[0] = False
    return {
        "train": [one for one, held in zip(all_of, chosen, strict=True) if not held],
        "held_out": [one for one, held in zip(all_of, chosen, strict=True) if held],
    }


@dataclass(frozen=True)
class Shard:
    """One split, memory-mapped: the tokens of its documents end to end, and where each begins."""

    folder: Path
    bytes_per_token: float  # bytes of text a predicted token
    yardsticks: dict[str, float]  # bits a byte of simpler models of the same text

    @cached_property
    def tokens(self) -> npt.NDArray[np.unsignedinteger]:
        return np.load(self.folder / "tokens.npy", mmap_mode="r")  # type: ignore[no-any-return]

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.load(self.folder / "starts.npy")  # type: ignore[no-any-return]

    @cached_property
    def given(self) -> npt.NDArray[np.int64]:
        """How many of each document's first tokens are no targets: those of its prompt."""
        return np.load(self.folder / "given.npy")  # type: ignore[no-any-return]

    @property
    def name(self) -> str:
        """Of the corpus: changes with its files, its split and its tokenizer."""
        return self.folder.parent.name

    def document_at(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which document the tokens at these places belong to."""
        return np.searchsorted(self.starts, index, side="right")

    def counts_at(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the tokens at these places may be targets."""
        owner = self.document_at(index) - 1
        return index - self.starts[owner] >= self.given[owner]


def shards(
    files: list[TextFile], tokenizer: Tokenizer, held_out: float, cache: Path, text_key: str = "text"
) -> dict[str, Shard]:
    """The corpus as shards, from the cache if the same files were tokenised before and nothing has changed there since.

    Warns of lines that were skipped, and of a cache that had to be made again.
    """
    folder = cache / _key(files, tokenizer, held_out, text_key)
    manifest = _manifest(folder)
    if manifest is None:
        _discard(folder)
        _write(folder, files, tokenizer, held_out, text_key)
        manifest = _manifest(folder)
    if manifest is None:
        raise ValueError(
            f"the tokens just written to {folder} do not read back as written: is the disk full or broken?"
        )
    for sentence in manifest["skipped"]:
        warnings.warn(sentence, stacklevel=2)
    return {name: Shard(folder / name, manifest["bytes_per_token"][name], manifest["yardsticks"]) for name in SPLITS}


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where it, or a file that it lists, is missing or not as it was written."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        intact = all(_digest(folder / name) == digest for name, digest in manifest["digests"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if intact else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(folder: Path) -> None:
    """Without a manifest, what a folder holds is replaced."""
    if (folder / "manifest.json").is_file():
        warnings.warn(f"the tokens kept in {folder} were cut short or changed; they are made again", stacklevel=3)
        (folder / "manifest.json").unlink()


def _key(files: list[TextFile], tokenizer: Tokenizer, held_out: float, text_key: str) -> str:
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint()} {held_out} {text_key!r}".encode())
    for file in files:
        digest.update(f"{file.name} {file.digest}\n".encode())
    return digest.hexdigest()[:24]


def _write(folder: Path, files: list[TextFile], tokenizer: Tokenizer, held_out: float, text_key: str) -> None:
    """Write beside the place and move there whole, so that a killed run leaves no half corpus."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new.", dir=folder.parent))
    try:
        documents, skipped = read(files, text_key)
        parts = split_by_name(documents, held_out) if len(documents) > 1 else _halves(documents[0], held_out)
        ratios = {name: _write_split(work / name, parts[name], tokenizer) for name in SPLITS}
        manifest = {
            "bytes_per_token": ratios,
            "yardsticks": yardsticks("".join(d.text for d in parts["held_out"]).encode()),
            "files": [(f.name, f.digest) for f in files],
            "skipped": skipped,
            "digests": {p.relative_to(work).as_posix(): _digest(p) for p in sorted(work.rglob("*.npy"))},
        }
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if not (folder / "manifest.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _halves(document: Document, held_out: float) -> dict[str, list[Document]]:
    """The beginning and the end of a corpus of one document. Raises ValueError where it has a prompt."""
    if document.prompt is not None:
        raise ValueError(
            f"data.path has one prompt and its completion only ({document.name}), and some must be held out; "
            "give two lines or more"
        )
    cut = max(1, round(len(document.text) * (1 - held_out)))
    end = document.text[cut:] or document.text[-1:]
    return {"train": [Document(document.name, document.text[:cut])], "held_out": [Document(document.name, end)]}


def _write_split(folder: Path, documents: list[Document], tokenizer: Tokenizer) -> float:
    """Tokens as the smallest unsigned integers that hold the vocabulary. Returns the bytes a predicted token.

    After a BOS or a prompt every byte of a text is predicted; without one, all but its first token's.
    """
    folder.mkdir()
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    found = [document.tokens(tokenizer) for document in _progress(documents, folder.name)]
    parts = [np.asarray(ids, dtype=dtype) for ids, _ in found]
    given = np.array([count for _, count in found], dtype=np.int64)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    np.save(folder / "starts.npy", np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64))
    np.save(folder / "given.npy", given)
    np.save(folder / "tokens.npy", np.concatenate(parts))
    predicted = (lengths - np.maximum(given, int(tokenizer.begins))).sum()
    return sum(len(document.text.encode()) for document in documents) / max(1, int(predicted))


def yardsticks(text: bytes) -> dict[str, float]:
    """Bits a byte of the text's own byte frequencies, and of gzip -9."""
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    share = counts[counts > 0] / len(text)
    unigram = float(-(share * np.log2(share)).sum())
    return {"unigram entropy": unigram, "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text)}


def _progress(documents: list[Document], split: str) -> Iterator[Document]:
    """A bar on a terminal, for corpora that take a while."""
    if not sys.stderr.isatty():
        return iter(documents)
    return iter(tqdm(documents, desc=f"tokenising {split}", leave=False))
