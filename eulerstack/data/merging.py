"""The parts of a corpus to its shards: documents split by name, their tokens end to end."""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .documents import Document, digest_of, read, skipped
from .splits import SPLITS, with_both
from .tokenizing import Part, Parts

Mask = npt.NDArray[np.bool_]


def write_corpus(folder: Path, parts: Parts) -> None:
    """Write beside the place and move there whole, so that a killed run leaves no half corpus."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new.", dir=folder.parent))
    try:
        counts = [part.lengths for part in parts]
        sentences = _sentences(parts)
        single = sum(map(len, counts)) == 1 and parts.held_out < 1
        written = _write_halves(work, parts) if single else _write_splits(work, parts)
        manifest = {
            **written,
            "files": [(f.name, f.digest) for f in parts.files],
            "skipped": sentences,
            "digests": {p.relative_to(work).as_posix(): digest_of(p) for p in sorted(work.rglob("*.npy"))},
        }
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sentences(parts: Parts) -> list[str]:
    """On the lines of each file that were skipped. Raises ValueError for a file without a line to train on."""
    totals: list[tuple[int, int, str]] = [(0, 0, "")] * len(parts.files)
    for file, count, bad, first in (piece for part in parts for piece in part.bad):
        before = totals[file]
        totals[file] = before[0] + count, before[1] + bad, before[2] or first
    said = (skipped(file, *total, parts.text_key) for file, total in zip(parts.files, totals, strict=True))
    return [sentence for one in said for sentence in one]


def _write_splits(work: Path, parts: Parts) -> dict[str, Any]:
    """The splits, from the parts, one after the other: a corpus need not fit into memory. All held out is one split."""
    held = np.concatenate([part.held for part in parts])
    whole = parts.held_out == 1
    held = held if whole else with_both(held)
    names = ("held_out",) if whole else SPLITS
    ratios = {name: _write_split(work / name, parts, held == (name == "held_out")) for name in names}
    return {"bytes_per_token": ratios, "yardsticks": yardsticks(_texts(parts, held))}


def _write_split(folder: Path, parts: Parts, chosen: Mask) -> float:
    """The chosen documents [documents]. Returns the bytes a predicted token.

    After a BOS or a prompt every byte of a text is predicted; without one, all but its first token's.
    """
    folder.mkdir()
    lengths, given, sizes = (
        np.concatenate([getattr(part, name) for part in parts])[chosen] for name in ("lengths", "given", "sizes")
    )
    tokens = (part.tokens[np.repeat(mine, part.lengths)] for part, mine in _beside(parts, chosen))
    dtype = np.min_scalar_type(parts.tokenizer.vocab_size - 1)
    _save(folder, lengths, given, dtype, tokens)
    predicted = (lengths - np.maximum(given, int(parts.tokenizer.begins))).sum()
    return float(sizes.sum() / max(1, int(predicted)))


def _save(
    folder: Path,
    lengths: npt.NDArray[np.int64],
    given: npt.NDArray[np.int64],
    dtype: np.dtype[Any],
    tokens: Iterable[npt.NDArray[Any]],
) -> None:
    """Tokens as the smallest unsigned integers that hold the vocabulary."""
    np.save(folder / "starts.npy", np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64))
    np.save(folder / "given.npy", given)
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (int(lengths.sum()),)}
    with (folder / "tokens.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        for some in tokens:
            file.write(some.tobytes())


def _beside(parts: Parts, chosen: Mask) -> Iterator[tuple[Part, Mask]]:
    """Each part, and which of its documents are chosen."""
    start = 0
    for part in parts:
        yield part, chosen[start : start + len(part.lengths)]
        start += len(part.lengths)


def _texts(parts: Parts, held: Mask) -> Iterator[bytes]:
    """What is held out, a part at a time."""
    for part, mine in _beside(parts, held):
        kept = part.held.copy()
        kept[-1:] = True  # as Part.text keeps them
        yield part.text[np.repeat(mine[kept], part.sizes[kept])].tobytes()


def _write_halves(work: Path, parts: Parts) -> dict[str, Any]:
    """The beginning and the end of a corpus of one document. Raises ValueError where it has a prompt."""
    (document,) = (d for part in parts.plan for _, piece in part for d in read(piece, parts.text_key).documents)
    if document.prompt is not None:
        raise ValueError(
            f"data.path has one prompt and its completion only ({document.name}), and some must be held out; "
            "give two lines or more"
        )
    cut = max(1, round(len(document.text) * (1 - parts.held_out)))
    halves = {"train": document.text[:cut], "held_out": document.text[cut:] or document.text[-1:]}
    ratios = {name: _write_half(work / name, parts, text) for name, text in halves.items()}
    return {"bytes_per_token": ratios, "yardsticks": yardsticks([halves["held_out"].encode()])}


def _write_half(folder: Path, parts: Parts, text: str) -> float:
    folder.mkdir()
    ids, given = Document(folder.name, text).tokens(parts.tokenizer)
    tokens = np.asarray(ids, dtype=np.min_scalar_type(parts.tokenizer.vocab_size - 1))
    _save(folder, np.array([len(ids)]), np.array([given]), tokens.dtype, [tokens])
    return len(text.encode()) / max(1, len(ids) - int(parts.tokenizer.begins))


def yardsticks(texts: Iterable[bytes]) -> dict[str, float]:
    """Bits a byte of the text's own byte frequencies, and of gzip -9."""
    counts, packed, small = np.zeros(256, dtype=np.int64), zlib.compressobj(9, wbits=31), 0
    for text in texts:
        counts += np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
        small += len(packed.compress(text))
    share, total = counts[counts > 0] / counts.sum(), int(counts.sum())
    unigram = float(-(share * np.log2(share)).sum())
    return {"unigram entropy": unigram, "gzip -9": 8 * (small + len(packed.flush())) / total}
