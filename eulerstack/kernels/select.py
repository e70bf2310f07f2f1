"""Which provider serves an operation: chosen once, when a mixer is built, by name or `auto`."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from .attention import torch as attention_torch
from .conv import torch as conv_torch
from .retention import torch as retention_torch
from .ssd import torch as ssd_torch

Kernel = Callable[..., Any]
Served = TypeVar("Served")


class Forms(NamedTuple):
    """An operation that has the three forms."""

    parallel: Kernel
    chunkwise: Kernel
    recurrent: Kernel


ATTENTION: dict[str, Kernel] = {"torch": attention_torch.attend}
CONV: dict[str, Kernel] = {"torch": conv_torch.convolve}
RETENTION = {"torch": Forms(retention_torch.parallel, retention_torch.chunkwise, retention_torch.recurrent)}
SSD = {"torch": Forms(ssd_torch.parallel, ssd_torch.chunkwise, ssd_torch.recurrent)}


def select(providers: dict[str, Served], name: str) -> Served:
    """The kernels of a provider; `auto` takes the fastest that can run here.

    Raises ValueError for a provider that this version does not have.
    """
    if name != "auto" and name not in providers:
        raise ValueError(f"kernels={name!r}: there is no such provider; use one of {', '.join(['auto', *providers])}")
    return providers["torch" if name == "auto" else name]
