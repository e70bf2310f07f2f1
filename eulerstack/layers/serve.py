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
    """Give each part of a module that is Served its kernels. Returns the choices."""
    parts = [part for part in module.modules() if isinstance(part, Served)]
    choices = {name: select(name, target) for name in dict.fromkeys(part.operation for part in parts)}
    for part in parts:
        part.ops = choices[part.operation].kernels
    return tuple(choices.values())
