"""A stack over several devices: layers split over ranks (tensor parallelism), weights sharded between them (FSDP2).

The mesh has two sides: the ranks of `data_parallel` read different rows, those of `tensor_parallel` compute parts of
the same ones. Matrices are sharded over the first side; decays, vectors, routers and Hyena's filters are small, and
every rank holds them whole, in their own precision. All parameters are DTensors over the same mesh, so that clipping,
optimizers and checkpoints see one kind; layers see none of that, for `local` puts plain tensors in their place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..block import Block
from ..layers.precision import FullPrecision, Precise
from ..layers.share import Share, Split
from ..model import Stack

Fill = Callable[[str, nn.Module], None]
"""Puts weights into a part of a stack, given the part's name."""
Place = tuple[nn.Module, str, Callable[[Tensor], Tensor]]
"""A parameter's owner and name, and what makes of the parameter the plain tensor that this rank computes with."""


@dataclass(frozen=True)
class Sides:
    """The two sides of a mesh, as this rank's share of each."""

    mesh: DeviceMesh
    data: Share
    tensor: Share

    @staticmethod
    def of(mesh: DeviceMesh) -> "Sides":
        """Of a mesh with the dimensions `data_parallel` and `tensor_parallel`."""
        sides = (mesh["data_parallel"], mesh["tensor_parallel"])
        return Sides(mesh, *(Share(side.get_local_rank(), side.size(), side.get_group()) for side in sides))

    def of_all(self, placements: tuple[Placement, Placement]) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        """The mesh that `fully_shard` leaves its parameters on, and the placements for it."""
        return (self.mesh["data_parallel"], placements[:1]) if self.tensor.of == 1 else (self.mesh, placements)


def shard(
    stack: Stack,
    mesh: DeviceMesh,
    device: torch.device,
    fill: Fill | None = None,
    compute: torch.dtype | None = None,
) -> None:
    """Bring a stack from the meta device onto the ranks of a mesh, a layer at a time.

    Every rank draws the weights of all ranks, with the same seed those of a single device, and keeps its own.
    fill: what replaces the drawn weights. compute: the dtype of the sharded matrices in a layer's products; the ranks
    keep them in their own. Raises ValueError for layers that cannot be split.
    """
    sides, names = Sides.of(mesh), {module: name for name, module in stack.named_modules()}
    ends: list[Place] = []
    for part, draw in list(stack.drawing()):
        part.to_empty(device=device)
        with torch.no_grad():
            draw()
        if fill is not None:
            fill(names[part], part)
        blocks = [module for module in part.modules() if isinstance(module, Block)]
        for block in blocks:
            _shard_block(block, sides, compute)
        layered = {p for block in blocks for p in block.parameters()}
        names_of_own = [name for name, p in part.named_parameters() if p not in layered]
        ends += [place for name in names_of_own for place in _placed(part, name, sides, None, added_up=False)]
    stack.local = partial(_local, ends)
    _shard(stack, sides, None)
    register_fsdp_forward_method(stack, "losses")


def _shard_block(block: Block, sides: Sides, compute: torch.dtype | None) -> None:
    plan = block.split(sides.tensor) if sides.tensor.of > 1 else {}
    _narrow(block, plan, sides.tensor.of)
    places: list[Place] = []
    for name in [name for name, _ in block.named_parameters()]:
        inside = name.startswith(("mixer.", "ffn."))
        places += _placed(block, name, sides, plan.get(name), added_up=inside)
    block.local = partial(_local, places)
    _shard(block, sides, compute)


def _narrow(block: Block, plan: Split, of: int) -> None:
    """Linear layers know their widths."""
    for name, dim in plan.items():
        owner = block.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Linear) and name.endswith("weight"):
            width = "in_features" if dim else "out_features"
            setattr(owner, width, getattr(owner, width) // of)


def _shard(module: nn.Module, sides: Sides, compute: torch.dtype | None) -> None:
    """What of a module is not sharded yet, and not held whole."""
    policy = MixedPrecisionPolicy(compute, None if compute is None else torch.float32, cast_forward_inputs=False)
    whole = {
        p for owner in module.modules() for name, p in owner.named_parameters(recurse=False) if _whole(owner, name)
    }
    fully_shard(module, mesh=sides.mesh["data_parallel"], mp_policy=policy, ignored_params=whole)


def _whole(owner: nn.Module, name: str) -> bool:
    """Whether all data-parallel ranks hold a parameter: vectors, decays, and what is computed in float32."""
    return isinstance(owner, FullPrecision | Precise) or owner.get_parameter(name).dim() < 2


def _placed(root: nn.Module, name: str, sides: Sides, dim: int | None, added_up: bool) -> list[Place]:
    """Make a parameter a DTensor, of which this rank's layer holds the part along `dim`.

    Empty where that is left to `fully_shard`, in whose layers it is plain.
    added_up: whether the shares of a layer each use it, so that their gradients add up.
    """
    path, _, leaf = name.rpartition(".")
    owner, tensor = root.get_submodule(path), sides.tensor
    parameter, split = owner.get_parameter(leaf).detach(), Replicate() if dim is None else Shard(dim)
    local = parameter if dim is None else tensor.part(parameter, dim).contiguous().clone()
    steps: list[Callable[[Tensor], Tensor]] = [tensor.enter] if added_up and dim is None else []
    if _whole(owner, leaf):
        steps += [sides.data.enter, sides.data.once]
        mesh, placements = sides.of_all((Replicate(), split))
    elif tensor.of > 1:
        mesh, placements = sides.mesh["tensor_parallel"], (split,)
    else:
        return []
    made = DTensor.from_local(local, mesh, placements, run_check=False)
    owner.register_parameter(leaf, nn.Parameter(made))
    return [(owner, leaf, partial(_through, steps))]


def _through(steps: list[Callable[[Tensor], Tensor]], t: Tensor) -> Tensor:
    assert isinstance(t, DTensor)
    part: Tensor = t.to_local()
    for step in steps:
        part = step(part)
    return part


@contextmanager
def _local(places: list[Place]) -> Iterator[None]:
    """Plain tensors in the places of the parameters."""
    held = [owner._parameters[name] for owner, name, _ in places]
    for (owner, name, make), parameter in zip(places, held, strict=True):
        assert parameter is not None
        owner._parameters[name] = make(parameter)  # type: ignore[assignment]
    try:
        yield
    finally:
        for (owner, name, _), parameter in zip(places, held, strict=True):
            owner._parameters[name] = parameter
