"""Many rows in float32 on a CPU: a convolution of width one, which PyTorch gives to oneDNN, where products go to MKL.

On an AMD EPYC MKL leaves AVX-512 alone: with oneDNN a product of 2,048 rows and its gradients take 0.44 to 0.51 of
the time (256 x 256 to 2,048 x 768, torch 2.13 on one or two threads), 128 rows 0.6, and whole training steps 0.65 to
0.78.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..provider import Provider, Target, on_cpu
from ..shapes import is_plain
from ..tracing import is_traced
from . import FEW, rows
from . import torch as reference

LEAST = 1 << 15  # numbers of x below which a convolution takes longer to set up than it saves


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """PyTorch's; from FEW rows on a convolution."""
    if not _serves(x, weights):
        return reference.linear(x, weights, biases)
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    given = [bias for bias in biases if bias is not None]
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last: no number moves
    # A dilation of a kernel one wide is none, but without it PyTorch keeps to its own loops on one thread.
    y = F.conv2d(pixels, weight[:, :, None, None], torch.cat(given) if given else None, dilation=(1, 2))
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    if is_traced() or torch.is_autocast_enabled("cpu"):
        return False
    many = x.numel() >= LEAST and rows(x) > FEW
    return many and is_plain(x) and all(is_plain(w) and w.shape[-1] == x.shape[-1] for w in weights)


def refuses(target: Target, **needs: object) -> str | None:
    """Without AVX-512 MKL's products are as fast."""
    if on_cpu(target):
        return on_cpu(target)
    if target.dtype != torch.float32:
        return "computes in float32 only"
    if not torch.backends.mkldnn.is_available():
        return "is not part of this PyTorch"
    capability: str = torch.backends.cpu.get_cpu_capability()
    return None if "512" in capability else f"is no faster on a CPU with {capability}"


PROVIDER = Provider(linear, refuses)
