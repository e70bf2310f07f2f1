"""FSDP2: Lightning's strategy for weights that are sharded over devices, and layers that are split over them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.fsdp import FSDPModule

from ..disk import to_disk
from .module import StackModule


class FSDP2(ModelParallelStrategy):
    """Sharded weights (`fully_shard`) over the devices, or over groups of `tensor_parallel` that split each layer.

    Checkpoints of a run are directories (torch.distributed.checkpoint), which resume on any number of devices. They
    are on the disk whole, or not at all.
    """

    def __init__(self, tensor_parallel: int = 1) -> None:
        super().__init__(tensor_parallel_size=tensor_parallel)
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
        path = Path(self.broadcast(filepath))
        work = path.with_name(f".{path.name}.new")
        if self.is_global_zero:
            shutil.rmtree(work, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, work, storage_options)
        self.barrier()
        if self.is_global_zero:
            _moved(work, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises ValueError for what is no such checkpoint, or one of another stack."""
        path = Path(self.broadcast(checkpoint_path))
        if not (path / "meta.pt").is_file():
            raise ValueError(
                f"{path} is no checkpoint of a run with strategy fsdp2, which are directories; resume with the "
                "strategy that wrote it, or start a new run from its checkpoint/"
            )
        module = self.lightning_module
        assert isinstance(module, StackModule)
        module.check_same(torch.load(path / "meta.pt", weights_only=True))
        return super().load_checkpoint(path, weights_only)


def _moved(work: Path, path: Path) -> None:
    """`work` in the place of what is there. Where that takes two steps, `recover` finishes them."""
    for file in (*work.iterdir(), work):
        to_disk(file)
    old = _old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(work, path)
    to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Put back the checkpoint that a killed process had moved out of the way of a new one."""
    if not path.exists() and _old(path).exists():
        os.replace(_old(path), path)


def forget(path: Path) -> None:
    """Delete the checkpoint, a file or a directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


StrategyRegistry.register("fsdp2", FSDP2, description="Weights sharded over the devices", tensor_parallel=1)
