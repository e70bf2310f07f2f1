"""Where the text is from: one folder, or several that are mixed by weight."""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .corpus import list_files, standard_library
from .documents import TextFile

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


def sources_of(given: list[dict[str, Any]] | None, path: str | None, pattern: str, text_key: str) -> tuple[Source, ...]:
    """The one source of path and pattern, or those given. Raises ValueError for what makes no mixture."""
    if given is None:
        return (Source(path, pattern, text_key, Fraction(1)),)
    if path is not None or pattern != "*":
        key = "path" if path is not None else "pattern"
        raise ValueError(f"data.{key} and data.sources are both given: write the {key} into the sources")
    if not isinstance(given, list) or not given:
        raise ValueError(f"data.sources = {given!r} must be a list of {{path: ..., weight: ...}}")
    for number, one in enumerate(given):
        _check(f"data.sources.{number}", one)
    weights = [Fraction(str(one["weight"])) for one in given]
    return tuple(
        Source(one["path"], one.get("pattern", "*"), one.get("text_key", text_key), weight / sum(weights))
        for one, weight in zip(given, weights, strict=True)
    )


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
