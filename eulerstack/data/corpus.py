"""Text to memory-mapped token shards: files listed and hashed, and what was made of them found again."""

import hashlib
import json
import shutil
import sysconfig
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..disk import alone
from ..tokens import Tokenizer
from .documents import TextFile
from .merging import digest_of, write_corpus
from .splits import SPLITS
from .tables import dataset_files
from .tokenizing import Parts

FORMAT = 3
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "dist-packages"}


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
    paths = _without_notes(paths)
    files = [_listed(p, p.relative_to(root).as_posix()) for p in paths if p.stat().st_size]
    if not files:
        raise ValueError(f"data.path = {str(root)!r} holds no files with text in them")
    return files


def _without_notes(paths: list[Path]) -> list[Path]:
    """Of a folder that `datasets` saved, the files with its rows alone."""
    rows = {folder: dataset_files(folder) for folder in {path.parent for path in paths}}
    notes = {path.parent / "dataset_dict.json" for path in paths}
    return [path for path in paths if path not in notes and path in (rows[path.parent] or {path})]


def _hidden(name: Path, skip: set[str]) -> bool:
    return any(part in skip or part.startswith(".") for part in name.parts)


def _listed(path: Path, name: str) -> TextFile:
    return TextFile(name, path, digest_of(path))


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
    def size(self) -> int:
        """How many tokens."""
        return len(self.tokens)

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
    files: list[TextFile],
    tokenizer: Tokenizer,
    held_out: float,
    cache: Path,
    text_key: str = "text",
    processes: int = 1,
) -> dict[str, Shard]:
    """The corpus as shards, from the cache if the same files were tokenised before and nothing has changed there since.

    Warns of lines that were skipped, and of a cache that had to be made again.
    """
    key = _key(files, tokenizer, held_out, text_key)
    folder, work = cache / key, cache / f".parts.{key}"
    manifest = _manifest(folder)
    if manifest is None:
        with alone(work):
            if _manifest(folder) is None:
                _discard(folder)
                parts = Parts.of(work, files, tokenizer, held_out, text_key)
                parts.make(processes)
                write_corpus(folder, parts)
                shutil.rmtree(work, ignore_errors=True)
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
        intact = all(digest_of(folder / name) == digest for name, digest in manifest["digests"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if intact else None


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
