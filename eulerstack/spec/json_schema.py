"""The language as JSON Schema, for editors; descriptions are the docstrings of the models and of their fields."""

import ast
import inspect
import json
import textwrap
from typing import Any

from .base import Block
from .extensions import extended, installed
from .stack import StackSpec

EXPRESSION = {"type": "string", "pattern": r"^\s*\$\{.*\}\s*$"}
LET: dict[str, Any] = {
    "additionalProperties": {"anyOf": [{"type": "number"}, EXPRESSION]},
    "description": "Numbers by names of your own, for expressions such as ${let.width * 2}.",
    "type": "object",
}
RESERVED = r"^(experimental|future|vendor)(\.|$)"


def schema(extensions: bool = False) -> str:
    """The language as JSON Schema; with the mixers of other packages that are installed, if asked for."""
    whole = StackSpec.model_json_schema()
    for block, node in {"StackSpec": whole, **whole["$defs"]}.items():
        for name, text in field_docs(by_name()[block]).items():
            node["properties"][name]["description"] = text
    extended(whole, installed() if extensions else {})
    whole["properties"] = {"let": LET, **whole["properties"]}
    return json.dumps(_for_editors(whole), indent=2) + "\n"


def by_name() -> dict[str, type[Block]]:
    """Every block of the language by its class's name."""
    found, queue = dict[str, type[Block]](), [Block]
    while queue:
        for cls in queue.pop().__subclasses__():
            if cls.__module__.startswith(__package__):  # other packages' are no part of it
                found[cls.__name__] = cls
                queue.append(cls)
    return found


def field_docs(cls: type[Block]) -> dict[str, str]:
    """The docstrings below a block's fields."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as doc)):
                docs[name] = inspect.cleandoc(doc)
    return docs


def _for_editors(node: Any) -> Any:
    """Expressions may stand for numbers, and reserved keys in any block; titles only repeat the names."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    parts = {key: _for_editors(item) for key, item in node.items() if not (key == "title" and isinstance(item, str))}
    if parts.get("type") in ("integer", "number"):
        about = {key: parts.pop(key) for key in ("description", "default") if key in parts}
        return {**about, "anyOf": [parts, EXPRESSION]}
    if parts.get("additionalProperties") is False:
        parts["patternProperties"] = {RESERVED: {}}
    return parts
