"""Which provider serves an operation: chosen once, when a mixer is built, by name or `auto`."""

from types import ModuleType

from .attention import torch as attention_torch
from .conv import torch as conv_torch
from .retention import torch as retention_torch
from .ssd import torch as ssd_torch

PROVIDERS: dict[str, dict[str, ModuleType]] = {
    "attention": {"torch": attention_torch},
    "conv": {"torch": conv_torch},
    "retention": {"torch": retention_torch},
    "ssd": {"torch": ssd_torch},
}


def select(operation: str, provider: str) -> ModuleType:
    """The module that computes `operation`; `auto` takes the fastest that can run here.

    Raises ValueError for a provider that this version does not have.
    """
    served = PROVIDERS[operation]
    name = "torch" if provider == "auto" else provider
    if name not in served:
        known = ", ".join(["auto", *served])
        raise ValueError(f"kernels={provider!r}: {operation} has no such provider; use one of {known}")
    return served[name]
