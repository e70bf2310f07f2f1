"""RMSNorm in PyTorch, its backward written out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import wide, without_autocast
from ..provider import Provider, anywhere
from . import RMS_EPS


@without_autocast
def rms_norm(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """x / rms(x) * weight over each of the equal parts of the last axis, in x's dtype."""
    dtype = wide(x.dtype)
    y: Tensor = _RMSNorm.apply(x.to(dtype).unflatten(-1, (groups, -1)), weight.to(dtype).unflatten(0, (groups, -1)))
    return y.flatten(-2).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Of x [..., G, n] and weight [G, n]. Keeps x and one number a group for the backward.

    PyTorch's own on a CPU keeps four copies of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / x.shape[-1] + RMS_EPS)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, scale = ctx.saved_tensors
        (grad,) = grads
        unit = x * scale
        for_weight = (grad * unit).flatten(0, -3).sum(0)
        inner = grad * weight
        mean = torch.linalg.vecdot(inner, unit)[..., None] / x.shape[-1]
        return torch.addcmul(inner, unit, mean, value=-1).mul_(scale), for_weight


PROVIDER = Provider(rms_norm, anywhere)
