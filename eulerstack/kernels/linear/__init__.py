"""x [..., in] -> x W^T + b [..., out], W [out, in]: every linear layer, whose rows are few in a step of decoding.

Kernels take several layers' weights and biases, and return their outputs side by side, [..., sum of out].
"""

from torch import Tensor

FEW = 32
"""Rows for which a product takes as long as its weights take to read."""


def rows(x: Tensor) -> int:
    """How many rows of [..., in] there are."""
    return x.shape[:-1].numel()
