"""Kernels for the parts of a layer: chosen once, when the stack is built."""

from typing import ClassVar

from torch import nn

from ..kernels.provider import Kernel, Target
from ..kernels.select import Choice, select


class Served:
    """A module whose mathematics is an operation of kernels/; PyTorch's until `serve` chose."""

    operation: ClassVar[str]
    ops: Kernel


def serve(module: nn.Module, target: Target) -> tuple[Choice, ...]:
    """Give each part of a module that is Served, and each linear layer, its kernels. Returns the choices.

    A linear layer stays nn.Linear, so that tools that look for one find it; `project` of linear.py uses its kernels.
    """
    parts = [(operation, part) for part in module.modules() if (operation := _operation_of(part)) is not None]
    choices = {name: select(name, target) for name in dict.fromkeys(operation for operation, _ in parts)}
    for operation, part in parts:
        part.ops = choices[operation].kernels
    return tuple(choices.values())


def _operation_of(part: nn.Module) -> str | None:
    if type(part) is nn.Linear:
        return "linear"
    return part.operation if isinstance(part, Served) else None
