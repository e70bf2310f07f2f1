"""What is wrong with a stack file, as sentences a person can act on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: the dotted key, what is wrong with its value, and what to write instead.

    It stands in a line of the file, or in the `place` that says otherwise.
    """

    key: str
    message: str
    fix: str
    category: str = "Schema"
    line: int | None = None
    column: int | None = None
    place: str | None = None

    def render(self, source: str) -> str:
        place = self.place or (source if self.line is None else f"{source}:{self.line}:{self.column}")
        named = not self.key or place == f"--set {self.key}"
        where = place if named else f"{place}: {self.key}"
        return f"{self.category}: {where}: {self.message}\nFix: {self.fix}"


class SpecWarning(UserWarning):
    """What a stack file says without effect."""


class SpecError(ValueError):
    """A stack file that cannot be built; lists every problem found."""

    def __init__(self, problems: list[Problem], source: str = "spec") -> None:
        self.problems = problems
        self.source = source
        super().__init__("\n".join(p.render(source) for p in problems))
