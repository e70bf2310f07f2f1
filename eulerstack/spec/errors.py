"""What is wrong with a stack file, as sentences a person can act on."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DOCS = "docs/errors.md"
CATEGORIES = (
    "File", "YAML", "Duplicate key", "Expression", "Unknown key", "Missing key", "Unsupported", "Type", "Choice",
    "Range", "Compatibility", "Setting", "Realism",
)  # fmt: skip
"""Kinds of mistakes (the last: of what is unlikely to be meant), each with a section in docs/errors.md."""


@dataclass(frozen=True)
class Problem:
    """One mistake: the dotted key, what is wrong with its value, and what to write instead.

    It stands in a line of the file, or in the `place` that says otherwise. allowed are the words or keys that may stand
    there, or a phrase for them; near is the one that was probably meant.
    """

    key: str
    message: str
    fix: str
    category: str = "Compatibility"
    line: int | None = None
    column: int | None = None
    place: str | None = None
    value: Any = None
    allowed: list[str] | str | None = None
    near: str | None = None

    @property
    def see(self) -> str:
        """Where the docs explain this kind of mistake."""
        return f"{DOCS}#{self.category.lower().replace(' ', '-')}"

    def render(self, source: str) -> str:
        """Three lines: what, the fix, and where to read on."""
        place = self.place or (source if self.line is None else f"{source}:{self.line}:{self.column}")
        named = not self.key or place == f"--set {self.key}"
        where = place if named else f"{place}: {self.key}"
        return f"{self.category}: {where}: {self.message}\nFix: {self.fix}\nSee: {self.see}"


class SpecWarning(UserWarning):
    """What a stack file says without effect."""


class SpecError(ValueError):
    """A stack file that cannot be built; lists every problem found."""

    def __init__(self, problems: list[Problem], source: str = "spec") -> None:
        self.problems = problems
        self.source = source
        super().__init__("\n".join(p.render(source) for p in problems))


def near(word: object, known: Iterable[str]) -> str | None:
    """The known word that was probably meant: alike but for case and dashes, or the closest."""
    folded = {_folded(name): name for name in known}
    found = difflib.get_close_matches(_folded(str(word)[:100]), folded, 1)
    return folded[found[0]] if found else None


def _folded(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")
