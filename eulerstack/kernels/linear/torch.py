"""PyTorch's product, for any number of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..provider import Provider, anywhere
from ..tracing import is_traced
from . import FEW, rows


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Many rows meet the joined weights in one product; for few, joining would take longer than the products.

    On a GPU that is so for any number that a step of decoding has, and where there are many it makes no difference. A
    trace shall not depend on how many there are.
    """
    if len(weights) == 1:
        return F.linear(x, weights[0], biases[0])
    if x.is_cuda or is_traced() or rows(x) <= FEW:
        return torch.cat([F.linear(x, *layer) for layer in zip(weights, biases, strict=True)], -1)
    given = [bias for bias in biases if bias is not None]
    return F.linear(x, torch.cat(tuple(weights)), torch.cat(given) if given else None)


PROVIDER = Provider(linear, anywhere)
