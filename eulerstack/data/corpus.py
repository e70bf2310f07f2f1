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
from .documents import TextFile, digest_of, is_empty
from .folders import files_below
from .merging import write_corpus
from .names import check_kind, name_bytes, shown
from .splits import BESIDE, TEST, TRAIN, VALIDATION, name_splits
from .tables import dataset_files, is_dict
from .tokenizing import Parts

FORMAT = 4
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "dist-packages"}


def standard_library() -> list[TextFile]:
    """Python's own standard-library sources on this machine, without their tests: the embedded corpus."""
    return list_files(Path(sysconfig.get_path("stdlib")), "*.py", skip=_SKIPPED)


def list_files(root: Path, pattern: str = "*", skip: set[str] | None = None) -> list[TextFile]:
    """The files of a folder in sorted order, each with its split, or the one file; none that is empty.

    Raises ValueError where there is no text, and for files that are no text.
    """
    if Path(pattern).is_absolute() or not pattern:
        raise ValueError(f"data.pattern = {pattern!r} must be a relative pattern, such as '*.txt'")
    if root.is_file():
        if is_empty(root):
            raise ValueError(f"data.path = {shown(root)!r} is an empty file; give text to train on")
        check_kind(root)
        return [TextFile.of(root, root.name)]
    if not root.is_dir():
        raise ValueError(f"data.path = {shown(root)!r} is no file and no folder; give text to train on")
    files = _with_splits(root, _without_notes(files_below(root, pattern, skip or set())))
    if not files:
        raise ValueError(f"data.path = {shown(root)!r} holds no files with text in them")
    return files


def _with_splits(root: Path, paths: list[Path]) -> list[TextFile]:
    """Raises ValueError for a split without text."""
    saved = {folder.relative_to(root) for folder in _above(root, paths) if is_dict(folder)}
    splits = name_splits((path.relative_to(root) for path in paths), saved)
    files = [_listed(path, root, splits[path.relative_to(root)]) for path in paths]
    found = [file for file in files if file is not None]
    for split in (TRAIN, VALIDATION, TEST):
        if split in splits.values() and split not in {file.split for file in found}:
            name = next(name for name, one in splits.items() if one == split)
            raise ValueError(f"the {split} split in {shown(root)} is empty ({shown(name)}): fill it, or remove it")
    return found


def _above(root: Path, paths: list[Path]) -> set[Path]:
    """The folders that hold the files, up to the root."""
    return {folder for path in paths for folder in path.parents if folder == root or root in folder.parents}


def _listed(path: Path, root: Path, split: str | None) -> TextFile | None:
    """None for an empty file. What lies beside splits is not read."""
    name = path.relative_to(root).as_posix()
    if split == BESIDE:
        return TextFile(name, path, "", (0, 0), split)
    check_kind(path)
    return None if is_empty(path) else TextFile.of(path, name, split)


def _without_notes(paths: list[Path]) -> list[Path]:
    """Of a folder that `datasets` saved, the files with its rows alone."""
    rows = {folder: dataset_files(folder) for folder in {path.parent for path in paths}}
    notes = {path.parent / "dataset_dict.json" for path in paths}
    return [path for path in paths if path not in notes and path in (rows[path.parent] or {path})]


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

    held_out: the share that is held out of files without a split; 1 for all, and nothing to train on. Warns of lines
    that were skipped, and of a cache that had to be made again.
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
                _check_unchanged(files, work)
                write_corpus(folder, parts)
                shutil.rmtree(work, ignore_errors=True)
        manifest = _manifest(folder)
    if manifest is None:
        raise ValueError(
            f"the tokens just written to {folder} do not read back as written: is the disk full or broken?"
        )
    for sentence in manifest["skipped"]:
        warnings.warn(sentence, stacklevel=2)
    ratios = manifest["bytes_per_token"]
    return {name: Shard(folder / name, ratio, manifest["yardsticks"]) for name, ratio in ratios.items()}


def _check_unchanged(files: list[TextFile], work: Path) -> None:
    """What was read is kept under the hash of the files as they were listed."""
    try:
        for file in files:
            file.check_unchanged()
    except ValueError:
        shutil.rmtree(work, ignore_errors=True)
        raise


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
        digest.update(name_bytes(f"{file.name} {file.digest} {file.split or ''}\n"))
    return digest.hexdigest()[:24]
