"""In what two specs differ, key by key."""

from collections.abc import Iterator
from typing import Any

from .stack import StackSpec

SHOWN = 5
_NONE = object()


def differ(was: StackSpec, now: StackSpec) -> str:
    """The keys whose values differ, as in "model.mlp_ratio was 4.0 and is 3.0"; "" for equal specs."""
    found = list(_differ("", was.model_dump(mode="json"), now.model_dump(mode="json")))
    more = [f"{len(found) - SHOWN} more keys differ"] if len(found) > SHOWN else []
    return "; ".join([*found[:SHOWN], *more])


def _differ(key: str, was: Any, now: Any) -> Iterator[str]:
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        for name in {**was, **now}:
            yield from _differ(f"{key}.{name}".lstrip("."), was.get(name, _NONE), now.get(name, _NONE))
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, pair in enumerate(zip(was, now, strict=True)):
            yield from _differ(f"{key}.{index}", *pair)
    else:
        yield f"{key} was {_said(was)} and is {_said(now)}"


def _said(value: Any) -> str:
    """Short values as they are; of long ones, what they are."""
    if value is _NONE:
        return "not there"
    if isinstance(value, list) and len(str(value)) > 60:
        return f"a list of {len(value)}"
    return "a block of its own" if isinstance(value, dict) else "none" if value is None else str(value)
