"""What a checkpoint directory says about itself without its weights being read; loads no torch."""

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
HEADER = "eulerstack.json"
WEIGHTS = "model.safetensors"


class Stored(NamedTuple):
    """One tensor of a checkpoint. dtype: as safetensors names it, as in F32 or BF16. bytes: its size in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        return prod(self.shape)


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The header of a checkpoint. Raises ValueError unless it is one of a format that this version reads."""
    missing = [name for name in (HEADER, "spec.yml", WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no checkpoint: it lacks {', '.join(missing)}; {_instead(folder)}")
    try:
        header: dict[str, Any] = json.loads((folder / HEADER).read_text())
        found = header["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is no checkpoint: its {HEADER} names no format") from None
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"{folder} has checkpoint format {found}; this version reads {FORMAT}")
    return header


def _instead(folder: Path) -> str:
    """What to give for a run's folder, or for the state of a run."""
    if (folder / "checkpoint" / HEADER).is_file():
        return f"give {folder / 'checkpoint'}"
    if folder.suffix == ".ckpt" and folder.is_file():
        return f"make one by `eulerstack checkpoint convert {folder} DIR`"
    return "give the folder that `fit` wrote"


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name, from the head of its file. Raises ValueError where it is damaged."""
    file = folder / WEIGHTS
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            if length > file.stat().st_size - 8:
                raise ValueError("it is cut short")
            entries = json.loads(data.read(length))
        entries.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        if 8 + length + max(ends, default=0) != file.stat().st_size:
            raise ValueError("it is cut short")
        return {name: _stored(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file} is damaged: {error}; convert the run's resume/last.ckpt again") from None


def _stored(entry: dict[str, Any]) -> Stored:
    start, end = entry["data_offsets"]
    return Stored(entry["dtype"], tuple(entry["shape"]), end - start)
