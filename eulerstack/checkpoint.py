"""A trained stack as a directory: spec.yml, model.safetensors, the tokenizer's file, and a format version."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .disk import put_folder
from .model import Stack, build
from .paths import expand_home
from .spec import StackSpec, dump, load, loads
from .stored import FORMAT, HEADER, WEIGHTS, check_checkpoint
from .tokens import Tokenizer

META = "meta.pt"
"""What is no tensor in a sharded run's directory, where Lightning looks for it."""


def save_checkpoint(
    model: Stack,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    notes: dict[str, Any] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the directory beside its place and move it there whole, so that none is ever half written.

    notes: what the header is to hold as well, as JSON. weights: the model's own unless given. Raises OSError where the
    disk does not take it, and leaves the directory that was there.
    """
    folder = expand_home(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        dump(model.spec, work / "spec.yml")
        found = model.state_dict() if weights is None else weights
        weights = {name: weight.detach().cpu().contiguous() for name, weight in found.items()}
        try:
            save_file(weights, str(work / WEIGHTS))
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written: {error}") from error
        if tokenizer is not None:
            tokenizer.save(work)
        header = {"format": FORMAT, "extensions": model.spec.extensions, **(notes or {})}
        (work / HEADER).write_text(json.dumps(header) + "\n")
        work.chmod(0o755)
        if folder.exists():
            check_checkpoint(folder)  # never delete what is not ours
        put_folder(work, folder)
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
    folder = expand_home(folder)
    check_checkpoint(folder)
    model = build(load(folder), device, dtype, kernels)
    load_weights(model, folder)
    return model.eval()


def load_weights(model: Stack, folder: Path) -> None:
    """Read a checkpoint's weights into a stack of the same spec, in the dtypes that the stack has."""
    try:
        weights = load_file(str(folder / WEIGHTS))
    except SafetensorError as error:
        raise _unfit(folder, error) from error
    _fill(model, weights, folder)


@contextmanager
def reading(model: Stack, folder: Path) -> Iterator[Callable[[str, nn.Module], None]]:
    """What reads a checkpoint's weights into one part of a stack like `model`, given the part's name.

    Raises ValueError where they are not those of the stack.
    """
    with _opened(folder) as file:
        wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
        if wanted != {name: file.get_slice(name).get_shape() for name in file.keys()}:  # noqa: SIM118 - no mapping
            raise _unfit(folder, ValueError("names or shapes differ"))

        def fill(name: str, part: nn.Module) -> None:
            names = part.state_dict()
            part.load_state_dict({own: file.get_tensor(f"{name}.{own}") for own in names})

        yield fill


def _opened(folder: Path) -> Any:
    try:
        return safe_open(folder / WEIGHTS, "pt")
    except SafetensorError as error:
        raise _unfit(folder, error) from error


def _fill(model: Stack, weights: dict[str, torch.Tensor], place: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise _unfit(place, error) from error


def _unfit(place: Path, error: Exception) -> ValueError:
    return ValueError(f"{place} holds weights that do not fit its spec: {error}")


def read_run(file: Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """What a run's resume/*.ckpt holds. Raises ValueError for a file that is damaged, or no such checkpoint."""
    if file.is_dir():
        raise ValueError(
            f"{file} is the directory of a run that was sharded; resume it with --trainer.strategy fsdp2, on any "
            "number of devices, or start a new run from its checkpoint/"
        )
    with file.open("rb") as data:
        try:
            found: dict[str, Any] = torch.load(data, map_location=map_location, weights_only=weights_only)
        except Exception as error:  # a damaged file raises almost anything
            raise ValueError(
                f"{file} cannot be read, it is damaged or no checkpoint of a run ({first_line(error)}); "
                "resume from another .ckpt, or start a new run from a checkpoint directory"
            ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no checkpoint of a run: it holds a {type(found).__name__}")
    return found


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def stack_of_run(file: Path, dtype: torch.dtype | None = None) -> Stack:
    """The stack of a run's resume/*.ckpt, in evaluation mode on the CPU. dtype: the one its spec names by default.

    Raises ValueError for a file, or a sharded run's directory, that holds no stack.
    """
    if file.is_dir():
        return _stack_of_shards(file, dtype)
    found = read_run(file)
    if "stack" not in found or "state_dict" not in found:
        raise ValueError(f"{file} holds no stack: give a resume/*.ckpt that `eulerstack fit` wrote")
    model = build(loads(found["stack"]), dtype=dtype)
    weights = {name.removeprefix("_built."): weight for name, weight in found["state_dict"].items()}
    _fill(model, weights, file)
    return model.eval()


def _stack_of_shards(folder: Path, dtype: torch.dtype | None) -> Stack:
    from torch.distributed.checkpoint import state_dict_loader  # noqa: PLC0415 - half a second, for few
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415

    if not (folder / META).is_file():
        raise ValueError(f"{folder} holds no stack: give a resume/*.ckpt that `eulerstack fit` wrote")
    model = build(loads(read_run(folder / META)["stack"]), dtype=dtype)
    weights = {f"_built.{name}": weight for name, weight in model.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
            state_dict_loader.load({"state_dict": weights}, checkpoint_id=folder, no_dist=True)  # into the stack's own
    except (CheckpointException, OSError) as error:
        raise ValueError(f"{folder} cannot be read, it is damaged ({str(error).splitlines()[0]})") from None
    return model.eval()


def with_dtype(spec: StackSpec, dtype: torch.dtype) -> StackSpec:
    """The same stack with another dtype, which `load_checkpoint` then takes."""
    name = str(dtype).removeprefix("torch.")
    return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": name})})
