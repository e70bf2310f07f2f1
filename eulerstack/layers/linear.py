"""Linear layers whose product is an operation: its kernels are chosen when the stack is built."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..kernels.linear import FEW, rows
from ..kernels.linear import torch as reference
from ..kernels.provider import Kernel, Target
from ..kernels.select import Choice, select


class Linear(nn.Linear):
    """nn.Linear by the kernels that `serve` gave it; PyTorch's until then."""

    ops: Kernel = staticmethod(reference.linear)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ops(x, (self.weight,), (self.bias,))
        return y


def serve(module: nn.Module | None, target: Target) -> tuple[Choice, ...]:
    """Give all linear layers of a module their kernels; the choice, if there are any."""
    layers = [m for m in module.modules() if isinstance(m, Linear)] if module is not None else []
    choice = select("linear", target)
    for layer in layers:
        layer.ops = choice.kernels
    return (choice,) if layers else ()


def joined(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    """The outputs of several layers side by side, [..., sum of out]."""
    y: Tensor = layers[0].ops(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
    return y


def beside(x: Tensor, layers: Sequence[Linear]) -> Sequence[Tensor]:
    """The output of each of several layers: few rows meet all weights in one call."""
    if rows(x) > FEW:
        return [layer(x) for layer in layers]
    parts: Sequence[Tensor] = joined(x, layers).split([layer.out_features for layer in layers], -1)
    return parts
