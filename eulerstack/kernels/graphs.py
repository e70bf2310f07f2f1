"""A step of decoding on a GPU, captured once as a CUDA graph and launched again and again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .watching import tensors_of, uncertain

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _Watch(TorchDispatchMode):
    """refused: whether something ran that a graph cannot hold: a number was read or drawn, or another device met."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        met = tensors_of([*args, *(kwargs or {}).values(), result])
        elsewhere = any(not t.is_cuda and (t.dim() > 0 or func in COPIES) for t in met)  # else a number of the program
        self.refused = self.refused or elsewhere or uncertain(func, args)
        return result


def captured(step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
    """The step's result, and what takes it again into that tensor; None where another time might do otherwise.

    A step that reads a number waits for the device, which no graph can. Capturing runs nothing.
    """
    with _Watch() as watch:
        result = step()
    if watch.refused:
        return result, None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result.copy_(step())
    return result, graph.replay
