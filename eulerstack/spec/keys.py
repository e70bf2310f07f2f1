"""What may stand where in a stack file: read off the models' JSON Schema."""

import math
from functools import cache
from typing import Any

from .extensions import ExtensionMixer, extended, known
from .stack import StackSpec
from .yaml import Path

Node = dict[str, Any]
KINDS = ("type", "variant", "pattern")
"""Keys that tell which of several blocks stands somewhere."""


def siblings(path: Path, data: Any = None) -> list[str]:
    """The keys that may stand where `path` does."""
    return sorted({key for node in nodes(path[:-1], data) for key in node.get("properties", {})})


def is_required(path: Path, data: Any) -> bool:
    """Whether something must stand there: a key without a default, a named block, an item of a list."""
    return all(path[-1] in node.get("required", ()) or not node.get("properties") for node in nodes(path[:-1], data))


def allowed(path: Path, data: Any) -> list[str] | str:
    """The words that may stand there, or a phrase for what may."""
    found = nodes(path, data)
    words = [word for node in found for word in _words(node)]
    return list(dict.fromkeys(words)) or " or ".join(dict.fromkeys(_phrase(node) for node in found))


def stand_in(path: Path, data: Any) -> Any:
    """Something that may stand there, so that the rest can be judged."""
    found = nodes(path, data)
    return _sample(found[0]) if found else None


def nodes(path: Path, data: Any) -> list[Node]:
    """The definitions of what may stand there; where the data say which of several is meant, that one."""
    found = _alternatives(_language(tuple(known().items())))
    for step in path:
        data = item(data, step)
        found = [part for node in found for part in _alternatives(_child(node, step))]
        found = [node for node in found if _fits(node, data)] or found
    return found


@cache
def _language(extensions: tuple[tuple[str, type[ExtensionMixer]], ...]) -> Node:
    """The models' JSON Schema, with these extensions."""
    return extended(StackSpec.model_json_schema(), dict(extensions))


def item(data: Any, step: str | int, missing: Any = None) -> Any:
    """What stands at one step of a path."""
    if isinstance(data, dict):
        return data.get(step, missing)
    within = isinstance(data, tuple | list) and isinstance(step, int) and step < len(data)
    return data[step] if within else missing


def _alternatives(node: Node) -> list[Node]:
    """The definitions that a node stands for."""
    if "$ref" in node:
        return [_language(tuple(known().items()))["$defs"][node["$ref"].rpartition("/")[2]]]
    options = node.get("anyOf") or node.get("oneOf")
    return [node] if not options else [part for option in options for part in _alternatives(option)]


def _child(node: Node, step: str | int) -> Node:
    if isinstance(step, int):
        first = node.get("prefixItems", [])[step : step + 1]
        found = first[0] if first else node.get("items")
    else:
        found = node.get("properties", {}).get(step) or node.get("additionalProperties")
    return found if isinstance(found, dict) else {"anyOf": []}


def _fits(node: Node, data: Any) -> bool:
    """Whether the block is the one that the data's `type` (or `variant`, or `pattern`) names."""
    if not isinstance(data, dict):
        return True
    properties = node.get("properties", {})
    if not set(node.get("required", ())) & set(KINDS) <= data.keys():
        return False
    written = [key for key in KINDS if key in data]
    return all(key in properties and data[key] in (_words(properties[key]) or [data[key]]) for key in written)


def _words(node: Node) -> list[str]:
    return [node["const"]] if "const" in node else list(node.get("enum", ()))


def _phrase(node: Node) -> str:
    kind = node.get("type")
    if kind in ("integer", "number"):
        return f"a {'whole ' if kind == 'integer' else ''}number{_bounds(node)}"
    plain = {"boolean": "true or false", "string": "a text", "array": "a list", "null": "null"}
    return plain.get(str(kind)) or "a mapping"


def _bounds(node: Node) -> str:
    low = f" from {node['minimum']}" if "minimum" in node else ""
    low = f" above {node['exclusiveMinimum']}" if "exclusiveMinimum" in node else low
    high = f" up to {node['maximum']}" if "maximum" in node else ""
    return low + (f" below {node['exclusiveMaximum']}" if "exclusiveMaximum" in node else high)


def _sample(node: Node) -> Any:
    """The smallest value that fits."""
    node = _alternatives(node)[0]
    if "properties" in node or node.get("type") == "object":
        named = {f"x{i}": _sample(node["additionalProperties"]) for i in range(node.get("minProperties", 0))}
        return named | {key: _sample(node["properties"][key]) for key in node.get("required", ())}
    if node.get("type") == "array":
        items = node.get("prefixItems") or [node.get("items", {})] * node.get("minItems", 0)
        return tuple(_sample(item) for item in items)
    if node.get("type") in ("integer", "number"):
        return node.get("minimum", math.floor(node.get("exclusiveMinimum", 0)) + 1)
    return False if node.get("type") == "boolean" else next(iter(_words(node)), "x")
