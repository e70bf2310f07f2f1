"""A trained stack as a directory: spec.yml, model.safetensors, the tokenizer's file, and a format version."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .model import Stack, build
from .spec import dump, load
from .tokens import Tokenizer

FORMAT = 1
_HEADER = "eulerstack.json"


def save_checkpoint(model: Stack, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the directory beside its place and move it there whole, so that none is ever half written."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        dump(model.spec, work / "spec.yml")
        weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
        save_file(weights, str(work / "model.safetensors"))
        if tokenizer is not None:
            tokenizer.save(work)
        (work / _HEADER).write_text(json.dumps({"format": FORMAT, "extensions": model.spec.extensions}) + "\n")
        work.chmod(0o755)
        _replace(folder, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def load_checkpoint(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
) -> Stack:
    """The stack of a checkpoint directory, in evaluation mode. dtype: the spec's model.dtype by default.

    Raises ValueError for a folder that is no checkpoint, or one whose weights do not fit its spec.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    model = build(load(folder), device, dtype, kernels)
    load_weights(model, folder)
    return model.eval()


def load_weights(model: Stack, folder: Path) -> None:
    """Read a checkpoint's weights into a stack of the same spec, in the dtypes that the stack has."""
    try:
        model.load_state_dict(load_file(str(folder / "model.safetensors")))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder} holds weights that do not fit its spec: {error}") from error


def check_checkpoint(folder: Path) -> None:
    """Raises ValueError unless the folder is a checkpoint of a format this version reads."""
    missing = [name for name in (_HEADER, "spec.yml", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no checkpoint: it lacks {', '.join(missing)}; give the folder that `fit` wrote")
    try:
        found = json.loads((folder / _HEADER).read_text())["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is no checkpoint: its {_HEADER} names no format") from None
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"{folder} has checkpoint format {found}; this version reads {FORMAT}")


def _replace(folder: Path, work: Path) -> None:
    if folder.exists():
        check_checkpoint(folder)  # never delete what is not ours
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, old / folder.name)
        os.replace(work, folder)
        shutil.rmtree(old)
    else:
        os.replace(work, folder)
