"""Channel mixing: y = down(act(up x)), or with a gate, y = down(act(gate x) * up x)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..spec import FFNSpec, GatedMLPSpec, MLPSpec


def _relu2(x: Tensor) -> Tensor:
    """Primer's squared ReLU (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "relu2": _relu2, "silu": F.silu}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


class MLP(nn.Module):
    def __init__(self, spec: MLPSpec, width: int, hidden: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.activation]
        self.up_proj = nn.Linear(width, hidden, bias=spec.bias)
        self.down_proj = nn.Linear(hidden, width, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act(self.up_proj(x)))
        return y


class GatedMLP(nn.Module):
    """SwiGLU and its kin (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, spec: GatedMLPSpec, width: int, hidden: int) -> None:
        super().__init__()
        self.act = GATES[spec.activation]
        self.gate_proj = nn.Linear(width, hidden, bias=spec.bias)
        self.up_proj = nn.Linear(width, hidden, bias=spec.bias)
        self.down_proj = nn.Linear(hidden, width, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y


def make_ffn(spec: FFNSpec, width: int, hidden: int) -> nn.Module | None:
    """The channel mixer a spec names; None for `type: none`."""
    if isinstance(spec, MLPSpec):
        return MLP(spec, width, hidden)
    if isinstance(spec, GatedMLPSpec):
        return GatedMLP(spec, width, hidden)
    return None


def init_ffn(ffn: nn.Module, out_scale: float) -> None:
    """Draw the weights anew; the projection into the residual stream is scaled by `out_scale`."""
    for name, layer in ffn.named_children():
        init_linear(layer, out_scale if name == "down_proj" else 1.0)


@torch.no_grad()
def init_linear(layer: nn.Module, scale: float = 1.0) -> None:
    """Weights uniform with deviation scale / sqrt(3 fan_in) (PyTorch's default scaled); biases zero."""
    assert isinstance(layer, nn.Linear)
    bound = scale / layer.in_features**0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
