"""Linear layers whose product is an operation: its kernels are chosen when the stack is built."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.provider import Kernel, Target
from ..kernels.select import Choice, select

FEW = 32  # rows from which on it is faster to join weights than to multiply by each


class Linear(nn.Linear):
    """nn.Linear by the kernels that `serve` gave it; PyTorch's until then."""

    ops: Kernel = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ops(x, self.weight, self.bias)
        return y


def serve(module: nn.Module | None, target: Target) -> tuple[Choice, ...]:
    """Give all linear layers of a module their kernels; the choice, if there are any."""
    layers = [m for m in module.modules() if isinstance(m, Linear)] if module is not None else []
    choice = select("linear", target)
    for layer in layers:
        layer.ops = choice.kernels
    return (choice,) if layers else ()


def joined(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    """The outputs of several layers side by side [..., sum of out].

    Many rows meet the joined weights in one product; for few, joining would take longer than the product.
    """
    if x.shape[:-1].numel() <= FEW:
        return torch.cat([layer(x) for layer in layers], -1)
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    return F.linear(x, torch.cat([layer.weight for layer in layers]), bias)
