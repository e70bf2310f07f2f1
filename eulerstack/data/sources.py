"""Where the text is from: one folder, or several that are mixed by weight."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..paths import expand_home
from .corpus import list_files, standard_library
from .documents import TextFile
from .names import name_bytes, shown
from .splits import BESIDE, TEST, TRAIN, VALIDATION

KEYS = ("path", "weight", "pattern", "text_key")


@dataclass(frozen=True)
class Source:
    """path: None for Python's standard library. share: of the rows, all of one for a source alone."""

    path: str | None
    pattern: str
    text_key: str
    share: Fraction

    def files(self) -> list[TextFile]:
        return standard_library() if self.path is None else list_files(Path(self.path), self.pattern)

    @property
    def name(self) -> str:
        return "Python's standard library" if self.path is None else shown(self.path)

    def to_train(self, files: list[TextFile]) -> list[TextFile]:
        """What trains and validates: by splits where one validates, otherwise without, to be held out by their names.

        Raises ValueError where all files are of other splits.
        """
        found = [file for file in files if file.split in (TRAIN, None)]
        held = [file for file in files if file.split == VALIDATION]
        if not found:
            raise ValueError(
                f"data.path = {self.name!r} holds {_said(files)}, and nothing to train on; "
                "to train on one of these, name the file or folder itself"
            )
        return [*(replace(file, split=TRAIN if held else None) for file in found), *held]

    def splits_said(self, files: list[TextFile]) -> str | None:
        """Which split is of which files; None where there are none."""
        return f"{self.name}: {_said(files)}" if any(file.split for file in files) else None


def to_test(files: list[TextFile]) -> tuple[str, list[TextFile]]:
    """The split that is measured, and its files: for testing, else for validation; none where there are none."""
    for split in (TEST, VALIDATION):
        if found := [replace(file, split=None) for file in files if file.split == split]:
            return split, found
    return "", []


def digest_of_files(files: list[TextFile]) -> str:
    """Of their names and bytes: how training on them is known again."""
    lines = sorted(name_bytes(f"{file.name} {file.digest}\n") for file in files)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _said(files: Iterable[TextFile]) -> str:
    texts = {TRAIN: "train", VALIDATION: "validation", TEST: "test", None: "of no split", BESIDE: "not read"}
    names = {split: [shown(file.name) for file in files if file.split == split] for split in texts}
    return "; ".join(f"{text}: {_some(names[split])}" for split, text in texts.items() if names[split])


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"


def sources_of(given: list[dict[str, Any]] | None, path: str | None, pattern: str, text_key: str) -> tuple[Source, ...]:
    """The one source of path and pattern, or those given. Raises ValueError for what makes no mixture."""
    if given is None:
        return (Source(_place(path), pattern, text_key, Fraction(1)),)
    if path is not None or pattern != "*":
        key = "path" if path is not None else "pattern"
        raise ValueError(f"data.{key} and data.sources are both given: write the {key} into the sources")
    if not isinstance(given, list) or not given:
        raise ValueError(f"data.sources = {given!r} must be a list of {{path: ..., weight: ...}}")
    for number, one in enumerate(given):
        _check(f"data.sources.{number}", one)
    weights = [Fraction(str(one["weight"])) for one in given]
    return tuple(
        Source(_place(one["path"]), one.get("pattern", "*"), one.get("text_key", text_key), weight / sum(weights))
        for one, weight in zip(given, weights, strict=True)
    )


def _place(path: str | Path | None) -> str | None:
    """Where the text is, an address such as s3://... as it is given."""
    if path is None or "://" in str(path):
        return None if path is None else str(path)
    scheme = "local:" if str(path).startswith("local:") else ""  # litdata's, for a folder that is not copied
    return scheme + str(expand_home(str(path).removeprefix(scheme)))


def _check(place: str, one: Any) -> None:
    if not isinstance(one, dict) or not {"path", "weight"} <= one.keys():
        raise ValueError(f"{place} = {one!r} must have a path and a weight, as in {{path: my_texts, weight: 2}}")
    for key, value in one.items():
        if key not in KEYS:
            raise ValueError(f"{place} has an unknown key {key!r}; its keys are {', '.join(KEYS)}")
        if key != "weight" and not (isinstance(value, str) and value):
            raise ValueError(f"{place}.{key} = {value!r} must be a text of one character or more")
    weight = one["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{place}.weight = {weight!r} must be a number above 0; leave out a source that is not wanted")
