"""RMSNorm and LayerNorm over the last axis, with statistics in at least float32."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels.precision import wide, without_autocast
from ..spec import NormSpec

RMS_EPS = 1e-6
LAYER_EPS = 1e-5


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), over each of `groups` equal parts of x."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype is weight.dtype is torch.float32 and self.groups == 1 and not torch.is_grad_enabled():
            return torch.rms_norm(x, weight.shape, weight, RMS_EPS)  # at once, what a step of decoding needs
        return rms_norm(x, self.weight, self.groups)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, LAYER_EPS, self.weight, self.bias)


Norm = RMSNorm | LayerNorm


def make_norm(spec: NormSpec, width: int) -> Norm:
    """The norm a spec names."""
    return RMSNorm(width) if spec.type == "rmsnorm" else LayerNorm(width)


@without_autocast
def rms_norm(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """x / rms(x) * weight over each of the equal parts of the last axis, in x's dtype."""
    dtype = wide(x.dtype)
    y: Tensor = _RMSNorm.apply(x.to(dtype).unflatten(-1, (groups, -1)), weight.to(dtype).unflatten(0, (groups, -1)))
    return y.flatten(-2).to(x.dtype)


@without_autocast
def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """PyTorch's, over the last axis, in x's dtype."""
    dtype = wide(x.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


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
