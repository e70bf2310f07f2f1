"""Which documents train, validate and test: by the names that people give to splits, or by the hash of a name."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from .names import LINES, TABLES, name_bytes

SPLITS = ("train", "held_out")
TRAIN, VALIDATION, TEST, BESIDE = "train", "validation", "test", "beside"
"""What a file is by its name or its folder's; BESIDE is none of the splits that it lies beside."""

_WORDS = {  # those of the Hugging Face hub
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
_KINDS = {word: split for split, words in _WORDS.items() for word in words}
_TEXTS = (".txt", ".text", ".json")
_NOTES = ("readme", "license", "licence", "citation", "dataset_info", "dataset_infos")


@dataclass(frozen=True)
class Entry:
    """A file or a folder of a folder, and the names of the files that it is or holds."""

    name: str
    folder: bool
    files: list[PurePath]

    def split(self, saved: bool) -> str | None:
        """saved: whether `datasets` saved the splits here, whose names may go on as in train_sft."""
        stem, end = (self.name, "") if self.folder else (PurePath(self.name).stem, PurePath(self.name).suffix.lower())
        if not self.folder and end not in (*TABLES, *LINES, *_TEXTS):
            return None
        found = re.fullmatch(rf"({'|'.join(_KINDS)}){_more(self.folder, saved, end)}", stem.lower(), re.DOTALL)
        return None if found is None else _KINDS[found[1]]


def _more(folder: bool, saved: bool, end: str) -> str:
    """What may follow the name of a split: nothing, a number, or in a file of rows, anything behind a dash."""
    if folder:
        return r"([-_.].*|\d*)" if saved else ""
    return r"([-_.]?\d.*|-.*)?" if end in (*TABLES, *LINES) else r"([-_.]?\d+)?"


def name_splits(files: Iterable[PurePath], saved: Collection[PurePath]) -> dict[PurePath, str | None]:
    """The split of each file, by its name in the corpus; None where its folder holds no splits.

    A folder holds splits where it has one to train on and another; any folder with one, where all files are of splits.
    saved: the folders that a `datasets.DatasetDict` was saved to, which hold splits where one is known by its name.
    """
    files = list(files)
    found = dict(_named(PurePath(), files, saved, True))
    if any(split is None and not _is_note(file) for file, split in found.items()):
        found = dict(_named(PurePath(), files, saved, False))
    above = {folder for file, split in found.items() if split is not None for folder in file.parents}
    notes = [file for file, split in found.items() if split is None and _is_note(file) and file.parent in above]
    return found | dict.fromkeys(notes, BESIDE)


def _is_note(file: PurePath) -> bool:
    """Whether it tells of the text that lies beside or below it."""
    return file.stem.lower() in _NOTES


def _named(
    here: PurePath, files: list[PurePath], saved: Collection[PurePath], alone: bool
) -> Iterator[tuple[PurePath, str | None]]:
    """alone: whether a folder of nothing but splits holds splits though there is none to train on."""
    entries = _entries(here, files)
    splits = [entry.split(here in saved) for entry in entries]
    counted = [split for entry, split in zip(entries, splits, strict=True) if not _is_note(PurePath(entry.name))]
    if _are_splits(counted, here in saved, alone):
        for entry, split in zip(entries, splits, strict=True):
            yield from ((file, split or BESIDE) for file in entry.files)
        return
    for entry in entries:
        yield from _named(here / entry.name, entry.files, saved, alone) if entry.folder else [(entry.files[0], None)]


def _are_splits(splits: list[str | None], saved: bool, alone: bool) -> bool:
    known = {split for split in splits if split is not None}
    if saved:
        return bool(known)
    return len(known) > 1 if TRAIN in known else alone and bool(known) and None not in splits


def _entries(here: PurePath, files: list[PurePath]) -> list[Entry]:
    depth, below = len(here.parts), dict[str, list[PurePath]]()
    for file in files:
        below.setdefault(file.parts[depth], []).append(file)
    return [Entry(name, some != [here / name], some) for name, some in below.items()]


def is_held(name: str, held_out: float) -> bool:
    """Whether the document of this name is held out, with the share `held_out` of all."""
    return int(hashlib.sha256(name_bytes(name)).hexdigest()[:8], 16) < held_out * 2**32


def with_both(held: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """held [documents], with the last of two or more held out where none was, and the first not where all were."""
    held = held.copy()
    if len(held) > 1 and not held.any():
        held[-1] = True
    if len(held) > 1 and held.all():
        held[0] = False
    return held
