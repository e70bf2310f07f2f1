"""`--set KEY=VALUE`: values of a stack file changed from outside, before anything is checked."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from .errors import Problem, SpecError
from .yaml import Document, Path, parse

Known = Callable[[Path], list[str]]


class _NoSuchKeyError(Exception):
    """What is wrong with a key, and its fix."""


def change(document: Document, settings: Iterable[str], known: Known) -> None:
    """Put each KEY=VALUE into the document: a dotted key with indices of lists, and a value in YAML.

    known(path) are the keys that the language has where `path` stands. A key that can stand nowhere joins the
    document's problems. Raises SpecError for a value that is no YAML.
    """
    if not isinstance(document.data, dict):
        return  # which is refused as such
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise SpecError([Problem("", "has no value", "write KEY=VALUE", "Setting")], f"--set {setting}")
        try:
            path = _path(document.data, key, known)
        except _NoSuchKeyError as error:
            message, fix = error.args
            document.problems.append(Problem(key, message, fix, "Setting", place=f"--set {key}"))
        else:
            document.data = _with(document.data, path, parse(text, f"--set {key}").data)
            document.settings[path] = key


def _path(data: Any, key: str, known: Known) -> Path:
    path: Path = ()
    value, rest = data, key
    while rest or not path:
        step, rest = _step(value, rest, path, known)
        path = (*path, step)
        value = value[step] if isinstance(value, tuple) or step in (value or {}) else None
    return path


def _step(value: Any, rest: str, path: Path, known: Known) -> tuple[str | int, str]:
    """The first part of a dotted key below `path`, and the rest of it. Names may hold dots themselves."""
    if isinstance(value, dict):
        there = [name for name in value if rest == name or rest.startswith(f"{name}.")]
        if there:
            name = max(there, key=len)
            return name, rest[len(name) + 1 :]
    first, _, more = rest.partition(".")
    if isinstance(value, tuple):
        if not first.isdecimal() or int(first) >= len(value):
            raise _NoSuchKeyError(f"{first!r} is no place in a list of {len(value)}", f"use 0 to {len(value) - 1}")
        return int(first), more
    if value is not None and not isinstance(value, dict):
        raise _NoSuchKeyError(f"nothing stands below {path[-1]}, which is {value!r}", f"remove .{rest}")
    _check(first, [*(value or {}), *known((*path, first))], path)
    return first, more


def _check(name: str, names: list[str], path: Path) -> None:
    """Raises _NoSuchKeyError for a name that is none of those that may stand below the path."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        fix = f"did you mean {near[0]!r}?" if near else f"the keys there are {', '.join(dict.fromkeys(names))}"
        where = f"below {path[-1]}" if path else "at the top"
        raise _NoSuchKeyError(f"there is no key {name!r} {where}", fix)


def _with(value: Any, path: Path, new: Any) -> Any:
    """The value with `new` at the path; mappings that are missing on the way are made."""
    if not path:
        return new
    step, rest = path[0], path[1:]
    if isinstance(value, tuple):
        return tuple(_with(item, rest, new) if i == step else item for i, item in enumerate(value))
    value = value or {}
    return {**value, step: _with(value.get(step), rest, new)}
