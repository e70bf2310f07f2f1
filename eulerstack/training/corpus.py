"""Text files to memory-mapped token shards: listed, hashed, split by file, tokenised once."""

import gzip
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..tokens import Tokenizer, document_ids

SPLITS = ("train", "held_out")
FORMAT = 2
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__", "dist-packages"}


@dataclass(frozen=True)
class TextFile:
    """A document: its name in the corpus, its file, and the hash of its bytes."""

    name: str
    path: Path
    digest: str


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


def split_files(files: list[TextFile], held_out: float) -> dict[str, list[TextFile]]:
    """A file is held out by the hash of its name, so that adding files moves no other; one file is split in two."""
    chosen = [int(hashlib.sha256(f.name.encode()).hexdigest()[:8], 16) < held_out * 2**32 for f in files]
    if len(files) > 1 and not any(chosen):
        chosen[-1] = True
    if len(files) > 1 and all(chosen):
        chosen[0] = False
    return {
        "train": [f for f, held in zip(files, chosen, strict=True) if not held],
        "held_out": [f for f, held in zip(files, chosen, strict=True) if held],
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

    @property
    def name(self) -> str:
        """Of the corpus: changes with its files, its split and its tokenizer."""
        return self.folder.parent.name

    def document_at(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which document the tokens at these places belong to."""
        return np.searchsorted(self.starts, index, side="right")


def shards(files: list[TextFile], tokenizer: Tokenizer, held_out: float, cache: Path) -> dict[str, Shard]:
    """The corpus as shards, from the cache if the same files were tokenised before."""
    folder = cache / _key(files, tokenizer, held_out)
    if not (folder / "manifest.json").is_file():
        _write(folder, files, tokenizer, held_out)
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: Shard(folder / name, manifest["bytes_per_token"][name], manifest["yardsticks"]) for name in SPLITS}


def _key(files: list[TextFile], tokenizer: Tokenizer, held_out: float) -> str:
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint()} {held_out}".encode())
    for file in files:
        digest.update(f"{file.name} {file.digest}\n".encode())
    return digest.hexdigest()[:24]


def _write(folder: Path, files: list[TextFile], tokenizer: Tokenizer, held_out: float) -> None:
    """Write beside the place and move there whole, so that a killed run leaves no half corpus."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new.", dir=folder.parent))
    try:
        parts = split_files(files, held_out)
        texts = {name: [_text(f) for f in part] for name, part in parts.items()}
        if len(files) == 1:
            texts = _halves(_text(files[0]), held_out)
        ratios = {name: _write_split(work / name, texts[name], tokenizer) for name in SPLITS}
        named = {name: [(f.name, f.digest) for f in part] for name, part in parts.items()}
        manifest = {
            "bytes_per_token": ratios,
            "yardsticks": yardsticks("".join(texts["held_out"]).encode()),
            "files": named,
        }
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if not (folder / "manifest.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _text(file: TextFile) -> str:
    try:
        text = file.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.path} is no UTF-8 text ({error.reason} at byte {error.start}); remove it from data.path"
        ) from None
    return text


def _halves(text: str, held_out: float) -> dict[str, list[str]]:
    """The beginning and the end of a corpus of one file."""
    cut = max(1, round(len(text) * (1 - held_out)))
    return {"train": [text[:cut]], "held_out": [text[cut:] or text[-1:]]}


def _write_split(folder: Path, texts: list[str], tokenizer: Tokenizer) -> float:
    """Tokens as the smallest unsigned integers that hold the vocabulary. Returns the bytes a predicted token.

    After a BOS every byte of a document is predicted; without one, all but its first token's.
    """
    folder.mkdir()
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    parts = [np.asarray(document_ids(tokenizer, text), dtype=dtype) for text in _progress(texts, folder.name)]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    np.save(folder / "starts.npy", np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64))
    np.save(folder / "tokens.npy", np.concatenate(parts))
    predicted = lengths.sum() - len(texts) if tokenizer.begins else lengths.sum()
    return sum(len(text.encode()) for text in texts) / max(1, int(predicted))


def yardsticks(text: bytes) -> dict[str, float]:
    """Bits a byte of the text's own byte frequencies, and of gzip -9."""
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    share = counts[counts > 0] / len(text)
    unigram = float(-(share * np.log2(share)).sum())
    return {"unigram entropy": unigram, "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text)}


def _progress(texts: list[str], split: str) -> Iterator[str]:
    """A bar on a terminal, for corpora that take a while."""
    if not sys.stderr.isatty():
        return iter(texts)
    return iter(tqdm(texts, desc=f"tokenising {split}", leave=False))
