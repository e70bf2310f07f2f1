"""checkpoint inspect: what a directory holds, from its header and the head of its weights; loads no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..paths import expand_home
from ..spec import HFTokenizer, LayerSpec, StackSpec, expand, load
from ..stored import Stored, check_checkpoint, stored_tensors
from .words import in_bytes, mixer_name, pattern

BUFFERS = ".correction.bias"
"""Tensors that end so are no parameters: a router's balancing biases."""


def inspect(folder: str, as_json: bool) -> None:
    """Print it as a table, or as JSON. Raises ValueError for a folder that is no checkpoint, or a damaged one."""
    found = figures(expand_home(folder))
    print(json.dumps(found, indent=2)) if as_json else Console().print(_table(found))


def figures(folder: Path) -> dict[str, Any]:
    """Name, layers, tokenizer and header of a checkpoint; parameters, bytes and dtypes of all and of each room."""
    header = check_checkpoint(folder)
    spec, tensors = load(folder), stored_tensors(folder)
    layers, rooms = expand(spec), dict[str, dict[str, Stored]]()
    for name, tensor in tensors.items():
        rooms.setdefault(_room(name, layers), {})[name] = tensor
    return {
        "name": spec.model.name,
        "layers": pattern(layers),
        "dtype": spec.model.dtype,
        "tokenizer": _tokenizer(spec, folder),
        **header,
        **_sums(tensors),
        "rooms": {room: _sums(inside) for room, inside in rooms.items()},
    }


def _room(name: str, layers: Sequence[LayerSpec]) -> str:
    """Where a tensor belongs: mixers by kind, FFNs by kind, norms of layers, or what it is called outside of layers."""
    first, _, rest = name.partition(".")
    index, _, part = rest.partition(".")
    if first != "layers" or not index.isdigit() or int(index) >= len(layers):
        return first
    layer = layers[int(index)]
    if part.startswith("mixer."):
        return f"mixers: {mixer_name(layer.mixer_type, layer.mixer)}"
    return f"FFNs: {layer.ffn.type}" if part.startswith("ffn.") else "norms of layers"


def _sums(tensors: dict[str, Stored]) -> dict[str, Any]:
    """parameters, bytes, and bytes by dtype."""
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.bytes
    count = sum(tensor.numbers for name, tensor in tensors.items() if not name.endswith(BUFFERS))
    return {"parameters": count, "bytes": sum(dtypes.values()), "bytes_by_dtype": dtypes}


def _tokenizer(spec: StackSpec, folder: Path) -> str:
    contract = spec.tokenizer_contract
    if not isinstance(contract, HFTokenizer):
        return "bytes"
    own = (folder / "tokenizer.json").is_file()
    return f"{folder / 'tokenizer.json'}" if own else f"{contract.pretrained} (not in the checkpoint)"


def _table(found: dict[str, Any]) -> Table:
    said = {key: value for key, value in found.items() if not isinstance(value, dict) and value and key != "name"}
    said = {key: value for key, value in said.items() if key not in ("parameters", "bytes")}
    caption = "\n".join(f"{key}: {value}" for key, value in said.items())
    table = Table(title=escape(found["name"]), title_justify="left", caption=escape(caption), caption_justify="left")
    table.add_column("room")
    for column in ("parameters", "bytes", "about", "dtypes"):
        table.add_column(column, justify="right")
    for name, part in {**found["rooms"], "all": found}.items():
        if name == "all":
            table.add_section()
        size, dtypes = part["bytes"], ", ".join(part["bytes_by_dtype"])
        table.add_row(name, f"{part['parameters']:,}", f"{size:,}", in_bytes(size), dtypes)
    return table
