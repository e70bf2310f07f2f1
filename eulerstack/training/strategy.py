"""FSDP2: Lightning's strategy for weights that are sharded over devices, and layers that are split over them."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule

from ..checkpoint import META, first_line, read_run
from ..disk import put_folder
from ..paths import expand_home
from .background import Writer
from .module import StackModule


class FSDP2(ModelParallelStrategy):
    """Sharded weights (`fully_shard`) over the devices, or over groups of `tensor_parallel` that split each layer.

    Checkpoints of a run are directories (torch.distributed.checkpoint), which resume on any number of devices. They
    are on the disk whole, or not at all. With `async_save` they are written while the run goes on, from a copy.
    """

    def __init__(self, tensor_parallel: int = 1, async_save: bool = False) -> None:
        super().__init__(tensor_parallel_size=tensor_parallel)
        self.async_save = async_save
        self._writer = Writer()
        if tensor_parallel < 1:
            raise ValueError(f"tensor_parallel = {tensor_parallel} must be 1 or more")

    def setup_environment(self) -> None:
        """Raises ValueError where the devices do not divide into groups."""
        world, tensor = self.num_nodes * self.num_processes, self._tensor_parallel_size
        assert isinstance(tensor, int)
        if world % tensor:
            raise ValueError(f"tensor_parallel = {tensor} does not divide the {world} devices of the run")
        self._data_parallel_size = world // tensor
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients of all but the last of accumulated batches stay where they are."""
        assert isinstance(self.lightning_module, StackModule)
        stack = self.lightning_module.model
        assert isinstance(stack, FSDPModule)
        stack.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            stack.set_requires_gradient_sync(True)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Written beside its place, and moved there by the first rank when all have written."""
        if storage_options is not None:
            raise TypeError("checkpoints are folders of this machine: storage_options are not taken")
        self.written()
        path = expand_home(self.broadcast(filepath))
        work = path.with_name(f".{path.name}.new")
        parts = {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        parts["state_dict"] = checkpoint.pop("state_dict")
        if self.is_global_zero:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            torch.save(checkpoint, work / META)
        self.barrier()
        if self.async_save:
            copied = dcp.async_save(parts, checkpoint_id=work, process_group=self._writers)
            assert isinstance(copied, Future)
            self._writer.begin(self._finished, copied.result, work, path)
        else:
            self._finished(lambda: dcp.save(parts, checkpoint_id=work), work, path)
            self.barrier()

    @cached_property
    def _writers(self) -> Any:
        """A group of all ranks for what is written beside the training, whose own messages would cross."""
        return dist.new_group(backend="gloo")

    def _finished(self, write: Callable[[], Any], work: Path, path: Path) -> None:
        """The first rank is told when all have written. Raises OSError where one could not."""
        try:
            write()
        except CheckpointException as error:
            raise OSError(f"{path} cannot be written: {_reason(error)}") from None
        if self.is_global_zero:
            put_folder(work, path)

    def written(self) -> None:
        """Wait for what is being written. Raises OSError where it could not be."""
        if self._writer.wait():
            self.barrier()

    def teardown(self) -> None:
        try:
            self.written()
        finally:
            self._writer.close()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises ValueError for what is no such checkpoint, one of another stack, or one that is damaged."""
        path = expand_home(self.broadcast(checkpoint_path))
        if not (path / META).is_file():
            raise ValueError(
                f"{path} is no checkpoint of a run with strategy fsdp2, which are directories; resume with the "
                "strategy that wrote it, or start a new run from its checkpoint/"
            )
        module = self.lightning_module
        assert isinstance(module, StackModule)
        module.check_same(read_run(path / META))
        try:
            return super().load_checkpoint(path, weights_only)
        except (Exception, CheckpointException) as error:  # a damaged file raises almost anything
            raise ValueError(
                f"{path} cannot be read, it is damaged ({_reason(error)}); start a new run from a checkpoint directory"
            ) from None


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on whichever rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def forget(path: Path) -> None:
    """Delete the checkpoint, a file or a directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


StrategyRegistry.register("fsdp2", FSDP2, description="Weights sharded over the devices", tensor_parallel=1)
