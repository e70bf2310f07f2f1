"""Programs that PyTorch follows (torch.export, make_fx, torch.jit.trace, torch.compile, torch.func, forward gradients).

It sees its own operations, and no loop of ours: what such a loop writes would be missing from the program. So while
PyTorch follows, loops of ours leave their work to PyTorch's kernels, which compute the same to rounding.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

P = ParamSpec("P")
R = TypeVar("R")


_SELECTIVE = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
"""Modes of selective checkpointing: what they do not see is computed again, which is right for a loop of ours."""


def is_traced() -> bool:
    """Whether PyTorch follows what this thread computes."""
    return (
        torch.compiler.is_compiling()
        or (torch._C._len_torch_dispatch_stack() > 0 and _is_followed(_get_current_dispatch_mode_stack()))
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def makes_program() -> bool:
    """Whether what is computed becomes a program for other numbers, so that nothing may depend on those of now."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return get_proxy_mode() is not None


def _is_followed(modes: Sequence[TorchDispatchMode]) -> bool:
    """Whether one of these dispatch modes has to see each operation. `sees_our_loops`: it hears of ours otherwise."""
    if any(getattr(mode, "sees_our_loops", False) for mode in modes):
        return False
    return not all(isinstance(mode, _SELECTIVE) for mode in modes)


def unless_traced(reference: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The decorated kernel, and `reference` while PyTorch follows."""

    def decorate(kernel: Callable[P, R]) -> Callable[P, R]:
        @wraps(kernel)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return (reference if is_traced() else kernel)(*args, **kwargs)

        return run

    return decorate
