"""Linear layers by kernels that are chosen when the stack is built."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..kernels.linear import FEW, rows
from ..kernels.linear import torch as reference
from .serve import Served


class Linear(nn.Linear, Served):
    """nn.Linear whose product is an operation."""

    operation = "linear"
    ops = staticmethod(reference.linear)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ops(x, (self.weight,), (self.bias,))
        return y


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
