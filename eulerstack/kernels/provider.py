"""What a provider of kernels is, and what is asked of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """Where a stack will run (device type, dtype), and whose kernels it asks for: a provider's name or `auto`."""

    kernels: str = "auto"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


class Forms(NamedTuple):
    """An operation that has the three forms."""

    parallel: Kernel
    chunkwise: Kernel
    recurrent: Kernel


class Provider(NamedTuple):
    """Kernels of one operation; `refuses(target, **needs)` says why they cannot serve, or None.

    A need that is not named is the least that there can be.
    """

    kernels: Any
    refuses: Callable[..., str | None]


def anywhere(target: Target, **needs: Any) -> str | None:
    """The reference's answer: it serves everything."""
    return None


def on_cpu(target: Target, **needs: Any) -> str | None:
    """The answer of kernels compiled for a CPU."""
    return None if target.device in ("cpu", "meta") else "runs on a CPU only"


def on_gpu(target: Target, **needs: Any) -> str | None:
    """The answer of kernels compiled for a GPU."""
    if target.device in ("cpu", "meta"):
        return "runs on a GPU only"
    return "has no float64" if target.dtype == torch.float64 else None


def on_triton(target: Target, **needs: Any) -> str | None:
    """The answer of Triton's kernels: for a GPU; its interpreter (TRITON_INTERPRET=1) runs them slowly on a CPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return on_gpu(replace(target, device="cuda") if interpreted else target)


def mamba_ssm(target: Target, *, numbers: int = 1) -> str | None:
    """The answer of mamba-ssm's kernels, which hold the d_state numbers of a channel at once."""
    return f"has d_state of up to 256, not {numbers}" if numbers > 256 else on_gpu(target)
