"""What a run trains with: each setting, its value, and where that came from."""

from collections.abc import Container, Iterator
from typing import Any

from ..spec import GroupSpec, StackSpec, idle_hints

Row = tuple[str, str, str]


def table(written: StackSpec, spec: StackSpec, changes: dict[str, Any], options: dict[str, Any]) -> str:
    """A line for every training hint that acts in `spec`.

    `written` is the stack's file, `changes` the hints that the command line put in place of the file's, and `options`
    what its other options put in place of both.
    """
    rows = list(_rows(written, spec, changes, options))
    key, value = (max(len(row[i]) for row in rows) for i in range(2))
    return "\n".join(f"{row[0]:{key}}  {row[1]:{value}}  {row[2]}" for row in rows)


def _rows(written: StackSpec, spec: StackSpec, changes: dict[str, Any], options: dict[str, Any]) -> Iterator[Row]:
    hints, file = spec.training_hints, written.training_hints
    given = changes.keys() | options.keys()
    idle = idle_hints(spec, hints.optimizer, hints.schedule)
    for key, value in hints:
        if key == "muon" and key not in idle:
            for name, part in hints.muon:
                yield f"muon.{name}", _plain(part), _origin(name, changes.get(key, ()), file.muon.model_fields_set)
        elif key not in idle:
            yield key, _plain(options.get(key, value)), _origin(key, given, file.model_fields_set)


def _origin(key: str, command_line: Container[str], file: Container[str]) -> str:
    return "command line" if key in command_line else "stack file" if key in file else "default"


def _plain(value: object) -> str:
    if isinstance(value, GroupSpec):
        decay = "" if value.weight_decay is None else f", weight_decay {value.weight_decay:g}"
        return f"{value.match}: lr x {value.lr_multiplier:g}{decay}"
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
