"""A wrong part made right, or set aside, so that the rest of the file is judged in the same pass."""

from typing import Any

from .errors import Problem, near
from .keys import is_required, item, siblings, stand_in
from .yaml import Document, Path

HARMLESS = {"repeat": 2}
"""Values that break no rule between keys."""
_GONE = object()


def mend(document: Document, path: Path, problem: Problem | None = None) -> None:
    """Put what was probably meant, a default or a stand-in where the problem is; what is guessed is not judged."""
    if problem is not None and problem.category == "Unknown key":
        _rename(document, path, problem.near)
    elif problem is not None and problem.category in ("Choice", "Missing key") and problem.near is not None:
        document.data = _put(document.data, path, problem.near)
    elif path[-1] in HARMLESS:
        document.data = _put(document.data, path, HARMLESS[str(path[-1])])
    else:
        document.doubtful.add(path)
        value = stand_in(path, document.data) if is_required(path, document.data) else _GONE
        document.data = _put(document.data, path, value)


def misspelt_beside(missing: Path, document: Document) -> bool:
    """Whether a key beside the missing one is its misspelling, and said to be."""
    beside = _at(document.data, missing[:-1])
    known = siblings(missing, document.data)
    return isinstance(beside, dict) and any(key not in known and near(key, known) == missing[-1] for key in beside)


def _rename(document: Document, path: Path, meant: str | None) -> None:
    """The key's value under the name that was meant, unless that is there too."""
    value, right = _at(document.data, path), (*path[:-1], meant or "")
    document.data = _put(document.data, path, _GONE)
    if meant is not None and value is not _GONE and _at(document.data, right) is _GONE:
        document.data = _put(document.data, right, value)
        moved = {p: place for p, place in document.places.items() if p[: len(path)] == path}
        document.places |= {right + p[len(path) :]: place for p, place in moved.items()}


def _at(value: Any, path: Path) -> Any:
    """What stands there, if anything does."""
    for step in path:
        value = item(value, step, _GONE)
    return value


def _put(value: Any, path: Path, new: Any) -> Any:
    """A copy of the value that has something else at the path; itself, where the path leads nowhere."""
    if not path:
        return new
    step, rest = path[0], path[1:]
    if isinstance(value, tuple | list):
        return tuple(_put(item, rest, new) if i == step else item for i, item in enumerate(value))
    if not isinstance(value, dict) or (rest and step not in value):
        return value
    kept = {key: item for key, item in value.items() if key != step}
    return kept if not rest and new is _GONE else {**kept, str(step): _put(value.get(str(step)), rest, new)}
