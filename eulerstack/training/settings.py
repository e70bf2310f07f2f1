"""What a run trains with: each setting, its value, and where that came from."""

from collections.abc import Iterator
from typing import Any

from ..spec import GroupSpec, StackSpec, idle_hints


def table(spec: StackSpec, places: dict[str, str], changes: dict[str, Any], options: dict[str, Any]) -> str:
    """A line for every training hint that acts in `spec`.

    `places` says where the stack file has its hints, `changes` what the command line put in their place, and `options`
    what its other options put in place of both.
    """
    origins = {key: f"training_hints, {place}" for key, place in places.items()}
    origins |= dict.fromkeys((*_flat(changes), *options), "command line")
    rows = [(key, _plain(options.get(key, value)), origins.get(key, "default")) for key, value in _acting(spec)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)


def _acting(spec: StackSpec) -> Iterator[tuple[str, Any]]:
    hints = spec.training_hints
    idle = idle_hints(spec, hints.optimizer, hints.schedule)
    for key, value in hints:
        if key == "muon" and key not in idle:
            yield from ((f"muon.{name}", part) for name, part in hints.muon)
        elif key not in idle:
            yield key, value


def _flat(changes: dict[str, Any]) -> Iterator[str]:
    for key, value in changes.items():
        yield from (f"{key}.{name}" for name in value) if key == "muon" else (key,)


def _plain(value: object) -> str:
    if isinstance(value, GroupSpec):
        decay = "" if value.weight_decay is None else f", weight_decay {value.weight_decay:g}"
        return f"{value.match}: lr x {value.lr_multiplier:g}{decay}"
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
