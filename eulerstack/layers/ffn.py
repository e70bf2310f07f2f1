"""Channel mixing: y = down(act(up x)), or with a gate, y = down(act(gate x) * up x)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..spec import GatedMLPSpec, MLPSpec
from .linear import kernel_of, project, project_each
from .share import WHOLE, Share, Split, columns


def _relu2(x: Tensor) -> Tensor:
    """Primer's squared ReLU (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "relu2": _relu2, "silu": F.silu}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up."""
    return F.gelu(gate) * up


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up."""
    return F.relu(gate) * up


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "geglu": geglu, "reglu": reglu}


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up for the backward, and computes silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    """down(act(up x)). `share`: of the hidden channels, where several ranks hold it together."""

    share: Share = WHOLE

    def __init__(self, spec: MLPSpec, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.act = ACTIVATIONS[spec.activation]
        self.up_proj = nn.Linear(width, hidden, bias=spec.bias)
        self.down_proj = nn.Linear(hidden, width, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        return project_down(self.act(project(x, self.up_proj)), self.down_proj, self.share)

    def split(self, share: Share) -> Split:
        """By hidden channels."""
        share.divided(self.hidden, HIDDEN)
        self.share = share
        return {**columns(("up_proj.weight", "up_proj.bias")), "down_proj.weight": 1}


class GatedMLP(nn.Module):
    """SwiGLU and its kin (Shazeer 2020, arXiv 2002.05202). `share` as in MLP."""

    share: Share = WHOLE

    def __init__(self, spec: GatedMLPSpec, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gated = GATES[spec.activation]
        self.gate_proj = nn.Linear(width, hidden, bias=spec.bias)
        self.up_proj = nn.Linear(width, hidden, bias=spec.bias)
        self.down_proj = nn.Linear(hidden, width, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project_each(x, self.gate_proj, self.up_proj)
        return project_down(self.gated(gate, up), self.down_proj, self.share)

    def split(self, share: Share) -> Split:
        """By hidden channels."""
        share.divided(self.hidden, HIDDEN)
        self.share = share
        names = (f"{name}_proj.{part}" for name in ("gate", "up") for part in ("weight", "bias"))
        return {**columns(names), "down_proj.weight": 1}


HIDDEN = "the hidden width of an ffn, mlp_ratio x model.d_model"


def project_down(x: Tensor, layer: nn.Linear, share: Share) -> Tensor:
    """The projection back. Where its inputs are split over ranks, the first one adds the bias."""
    if share.of == 1 or layer.bias is None:
        return project(x, layer)
    y: Tensor = kernel_of(layer)(x, (layer.weight,), (layer.bias * (share.rank == 0),))
    return y


@torch.no_grad()
def init_linear(layer: nn.Module, scale: float = 1.0) -> None:
    """Weights uniform with deviation scale / sqrt(3 fan_in) (PyTorch's default scaled); biases zero."""
    assert isinstance(layer, nn.Linear)
    bound = scale / layer.in_features**0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def matmul_flops(module: nn.Module, tokens: int) -> int:
    """Forward FLOPs of the module's linear layers over `tokens` tokens."""
    return sum(2 * tokens * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
