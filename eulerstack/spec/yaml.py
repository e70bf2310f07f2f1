"""YAML text to plain data, and where in the file each key stands.

Built on the events of the safe loader's parser: scalars read by YAML 1.2's core rules (3e-4 is a number, `no` is a
string), duplicate keys, merge keys, tags and runaway aliases refused. Sequences come back as tuples.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import Problem, SpecError

Path = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 40

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)  # type: ignore[arg-type]


@dataclass
class Document:
    """The data of a file, where its keys and items stand, what brought its extensions, and what `--set` changed.

    doubtful are the paths whose values cannot be judged.
    """

    data: Any
    places: dict[Path, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    extensions: dict[str, str] = field(default_factory=dict)
    settings: dict[Path, str] = field(default_factory=dict)
    doubtful: set[Path] = field(default_factory=set)

    def place(self, path: Path) -> tuple[int | None, int | None]:
        """Where the path, or the nearest key above it, stands."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return (1, 1) if self.places else (None, None)


def parse(text: str, source: str) -> Document:
    """Raises SpecError for text that is no YAML, or is made to exhaust the reader."""
    if len(text) > MAX_BYTES:
        raise SpecError(
            [Problem("", f"the file has more than {MAX_BYTES:,} characters", "split it up", "YAML")], source
        )
    try:
        reader = _Reader(yaml.parse(text, Loader=_Loader))
        return reader.document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        what = " ".join(filter(None, (error.context, error.problem)))
        raise SpecError(
            [Problem("", f"not YAML: {what}", "correct the syntax here", "YAML", line, column)], source
        ) from None
    except yaml.reader.ReaderError as error:
        raise SpecError(
            [Problem("", f"not YAML text: {error.reason}", "save the file as UTF-8", "YAML")], source
        ) from None
    except _RefusedError as error:
        raise SpecError([error.problem], source) from None


class _RefusedError(Exception):
    def __init__(self, message: str, fix: str, event: Any) -> None:
        mark = event.start_mark
        self.problem = Problem("", message, fix, "YAML", mark.line + 1, mark.column + 1)


class _Reader:
    """A recursive reader of parser events, bounded in depth and in nodes (aliases count each time they are used)."""

    def __init__(self, events: Iterator[Any]) -> None:
        self.events = events
        self.out = Document(None)
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.nodes = 0
        self.documents = 0

    def document(self) -> Document:
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self.documents:
                    raise _RefusedError("the file holds more than one YAML document", "keep one", event)
                self.documents += 1
                self.out.data = self.node(next(self.events), ())
        return self.out

    def node(self, event: Any, path: Path) -> Any:
        self.count(1, event)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, path)
        if event.tag not in (None, "!"):
            self.wrong(path, f"the tag {event.tag} is not supported", "write plain values without tags", event)
        before = self.nodes
        if len(path) > MAX_DEPTH:
            raise _RefusedError(f"nested deeper than {MAX_DEPTH} levels", "flatten it", event)
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self.sequence(path)
        else:
            value = self.mapping(path)
        if event.anchor:
            self.anchors[event.anchor] = (value, self.nodes - before + 1)
        return value

    def sequence(self, path: Path) -> tuple[Any, ...]:
        items: list[Any] = []
        for event in self.events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            here = (*path, len(items))
            self.out.places[here] = _place(event)
            items.append(self.node(event, here))
        return tuple(items)

    def mapping(self, path: Path) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self.key(event, path)
            here = (*path, key)
            if key == "<<":
                self.wrong(here, "merge keys (<<) are not supported", "write the keys out", event)
                self.node(next(self.events), here)
                continue
            if key in out:
                self.duplicate(here, event)
            self.out.places[here] = _place(event)
            out[key] = self.node(next(self.events), here)
        return out

    def key(self, event: Any, path: Path) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise _RefusedError("a key must be a plain word", "write `key: value`", event)
        value = _scalar(event)
        if not isinstance(value, str):
            self.wrong((*path, event.value), f"the key {event.value!r} is no word", f'quote it: "{event.value}"', event)
        return str(event.value)

    def wrong(self, path: Path, message: str, fix: str, event: Any) -> None:
        """What can be read on after."""
        self.out.problems.append(Problem(dotted(path), message, fix, "YAML", *_place(event)))

    def duplicate(self, path: Path, event: Any) -> None:
        line = self.out.places[path][0]
        message = f"given twice, first in line {line}"
        self.out.problems.append(Problem(dotted(path), message, "keep one of them", "Duplicate key", *_place(event)))

    def alias(self, event: Any, path: Path) -> Any:
        if event.anchor not in self.anchors:
            self.wrong(path, f"the alias *{event.anchor} has no anchor before it", "define it first", event)
            self.out.doubtful.add(path)
            return None
        value, size = self.anchors[event.anchor]
        self.count(size, event)
        return value

    def count(self, more: int, event: Any) -> None:
        self.nodes += more
        if self.nodes > MAX_NODES:
            raise _RefusedError(f"the file expands to more than {MAX_NODES:,} values", "use fewer aliases", event)


def _place(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _scalar(event: Any) -> Any:
    quoted = not event.implicit[0]
    return event.value if quoted else read_scalar(event.value)


def read_scalar(text: str) -> Any:
    """The value of an unquoted scalar by YAML 1.2's core rules."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text) if len(text) < 400 else float(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return math.copysign(math.inf, -1 if text[0] == "-" else 1)
    return math.nan if text in (".nan", ".NaN", ".NAN") else text


def dotted(path: Path) -> str:
    """The path as messages write it: layer_schedule.0.repeat."""
    return ".".join(map(str, path))
