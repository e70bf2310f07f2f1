"""The page docs/reference.md, from the schema that editors read and the table of refused keys: `make docs`."""

import json
from typing import Any

from eulerstack.spec import schema
from eulerstack.spec.refused import KEYS, VALUES

Node = dict[str, Any]

FILE: Node = json.loads(schema())
BLOCKS: dict[str, Node] = FILE["$defs"]

INTRODUCTION = """\
# The language

Every key of a stack file: its type and bounds, its default, what it does. This page is made from the language's own
models by `make docs`; `eulerstack schema` prints the same for editors. A key that stands in no table is an error.
[tutorial.md](tutorial.md) is the place to start; [errors.md](errors.md) tells what the checks say and how to go on.

Where a number may stand, an expression such as `${let.width * 2}` may stand too.
"""

LET = """\
## `let` and expressions

`let` gives numbers names; `${...}`, as a whole value, computes with them. An expression has numbers, `let.NAME` of a
name above it, `+ - * / //`, signs and parentheses; at most 200 characters, and no number beyond 1e18. A result without
a fraction is a whole number, so that `${let.width / 2}` can be a width. A name that nothing uses is a warning.

```yaml
let: {width: 256, half: "${let.width // 2}"}
model: {name: mine, d_model: "${let.width}", n_heads: 4, vocab_size: 256, max_seq_len: "${let.half * 16}"}
```
"""

SCHEDULES = """\
## Schedules

`layer_schedule` is a list of entries, first layer first. The examples name templates `a`, `m` and `r`.

A template, repeated:

```yaml
layer_schedule:
  - {template: m, repeat: 3}
  - {template: a}
```

A pattern in one text, repeated; twelve layers here:

```yaml
layer_schedule:
  - {pattern: m r m r m a, repeat: 2}
```

Patterns within patterns; seven layers here, m m r m m r a:

```yaml
layer_schedule:
  - pattern:
      - {pattern: m m r, repeat: 2}
      - a
```

Layers that differ from their template in a value that changes no parameter:

```yaml
layer_schedule:
  - {template: a, repeat: 3, override: {attention: {window: 512}}}
  - {template: a, override: {attention: {window: null}, residual: {scaling: 0.5}}}
```

Layers that share their weights, each with a state of its own; the first and the last layer here:

```yaml
layer_schedule:
  - {template: a, shared: block}
  - {template: m, repeat: 2}
  - {template: a, shared: block}
```
"""

RESERVED = """\
## Reserved prefixes

Keys that begin with `experimental.`, `future.` or `vendor.NAME.` may stand in any block. They do nothing, and loading a
file that has them prints a warning.
"""


def page() -> str:
    """The whole of docs/reference.md."""
    sections = _Sections()
    sections.add("The file", FILE)
    return "\n".join([INTRODUCTION, *sections.texts, SCHEDULES, LET, RESERVED, refused()])


def refused() -> str:
    """What v1 knows and this language refuses."""
    keys = [f"| `{key}` | {why} | {fix} |" for key, (why, fix) in sorted(KEYS.items())]
    values = [f"| `{value}` | {why} |" for value, why in sorted(VALUES.items())]
    return "\n".join(
        [
            "## Refused by name",
            "",
            "Keys that other readers of the v1 language take and this one does not:",
            "",
            "| key | why | instead |",
            "|---|---|---|",
            *keys,
            "",
            "Values, where the language takes others:",
            "",
            "| value | why |",
            "|---|---|",
            *values,
            "",
        ]
    )


class _Sections:
    """One section a block, in the order of the file; a block met again is linked to."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.texts: list[str] = []

    def add(self, path: str, block: Node, anchor: str = "file") -> None:
        """The block's table, then the blocks it holds. path: where the block stands in a file."""
        required = block.get("required", [])
        unset = "the template's" if ".override" in path else None
        rows = [
            _row(name, key, "required" if name in required else unset or _default(key))
            for name, key in block["properties"].items()
        ]
        table = ["| key | type and bounds | default | what it does |", "|---|---|---|---|", *rows]
        about = block["description"].replace("\n\n", " ").replace("\n", " ")
        self.texts.append("\n".join([f'## <a id="{anchor}"></a>{path}', "", about, "", *table, ""]))
        for name, key in block["properties"].items():
            where = name if anchor == "file" else f"{path.partition(' (')[0].strip('`')}.{name}"
            for step, held in _held(key):
                self._once(where + step, held)

    def _once(self, path: str, name: str) -> None:
        if name in self.seen:
            return
        self.seen.add(name)
        tag = _tag(BLOCKS[name])
        self.add(f"`{path}`" + (f" ({tag})" if tag else ""), BLOCKS[name], name.lower())


def _tag(block: Node) -> str:
    """Which of several blocks in one place this is."""
    return "".join(
        f"{name}: {block['properties'][name]['const']}" for name in ("type", "variant") if _is_tag(block, name)
    )


def _is_tag(block: Node, name: str) -> bool:
    return name in block.get("required", []) and "const" in block["properties"][name]


def _row(name: str, key: Node, default: str) -> str:
    cells = [f"`{name}`", _type(key), default, _about(key)]
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"


def _about(key: Node) -> str:
    """What the key does; one that only holds a block does what the block does."""
    text: str = key.get("description") or (BLOCKS[_name(key)]["description"] if "$ref" in key else "Says which it is.")
    return text


def _default(key: Node) -> str:
    match key.get("default"):
        case None:
            return "none"
        case dict():
            return "its own defaults"
        case value:
            return f"`{json.dumps(value).strip(chr(34))}`"


def _type(node: Node) -> str:  # noqa: PLR0911
    """A type in words."""
    if "$ref" in node:
        name = _name(node)
        return f"[{_tag(BLOCKS[name]) or 'block'}](#{name.lower()})"
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return "one of " + ", ".join(f"`{value}`" for value in node["enum"])
    if kinds := _kinds(node):
        words = list(dict.fromkeys(_type(kind) for kind in kinds))
        return " or ".join(word for word in words if word != "null") + (", or null" if "null" in words else "")
    match node.get("type"):
        case "integer" | "number":
            return ("whole number" if node["type"] == "integer" else "number") + _bounds(node)
        case "array" if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])}, each: {_type(node['prefixItems'][0])}"
        case "array":
            return f"list of {_type(node['items'])}"
        case "object":
            return f"names of your own, each: {_type(node['additionalProperties'])}"
    return {"boolean": "`true` or `false`", "string": "text", "null": "null"}[node["type"]]


def _bounds(node: Node) -> str:
    match node:
        case {"minimum": low, "maximum": high}:
            return f", {_number(low)} to {_number(high)}" if low != high else f" {_number(low)}"
        case {"exclusiveMinimum": low, "maximum": high}:
            return f", above {_number(low)}, up to {_number(high)}"
        case {"minimum": low, "exclusiveMaximum": high}:
            return f", {_number(low)} or more, below {_number(high)}"
        case {"minimum": low}:
            return f", {_number(low)} or more"
        case {"exclusiveMinimum": low}:
            return f", above {_number(low)}"
    return ""


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _kinds(node: Node) -> list[Node]:
    """The alternatives of a node, less the expressions that may stand for any number."""
    kinds = node.get("anyOf", []) + node.get("oneOf", [])
    return [kind for kind in kinds if r"\$\{" not in kind.get("pattern", "")]


def _held(node: Node) -> list[tuple[str, str]]:
    """The blocks that a value may hold, and the steps to them."""
    if "$ref" in node:
        return [("", _name(node))]
    held = [found for kind in _kinds(node) for found in _held(kind)]
    if "items" in node:
        held += [(".N" + step, name) for step, name in _held(node["items"])]
    if isinstance(node.get("additionalProperties"), dict):
        held += [(".NAME" + step, name) for step, name in _held(node["additionalProperties"])]
    return held


def _name(node: Node) -> str:
    name: str = node["$ref"].rpartition("/")[2]
    return name


if __name__ == "__main__":
    print(page(), end="")
