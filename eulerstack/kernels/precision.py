"""At least float32: the precision of decays, recurrent states and the statistics of norms."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit dtypes, otherwise the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a kernel in the dtypes it chose itself, also inside an autocast region."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
