"""RMSNorm and LayerNorm over the last axis, with statistics in at least float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.norm import RMS_EPS
from ..kernels.norm.torch import rms_norm
from ..kernels.precision import wide, without_autocast
from ..spec import NormSpec
from .serve import Served
from .share import WHOLE, Share

LAYER_EPS = 1e-5


class RMSNorm(nn.Module, Served):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), over each of `groups` equal parts of x."""

    operation = "norm"
    ops = staticmethod(rms_norm)

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.share: Share = WHOLE  # of the width of a single group
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.share.of > 1:
            return self._over_ranks(x)
        y: Tensor = self.ops(x, self.weight, self.groups)
        return y

    @without_autocast
    def _over_ranks(self, x: Tensor) -> Tensor:
        """The statistics are of all ranks' parts of x."""
        own = x.to(wide(x.dtype))
        mean = self.share.total(own.square().mean(-1, keepdim=True)) / self.share.of
        return (own * torch.rsqrt(mean + RMS_EPS) * self.weight.to(own.dtype)).to(x.dtype)


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
def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """PyTorch's, over the last axis, in x's dtype."""
    dtype = wide(x.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)
