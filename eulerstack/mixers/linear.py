"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), normalised: retention without a decay."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.precision import wide
from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear
from ..layers.linear import project
from ..segments import Segments
from ..spec import LinearAttentionSpec, StackSpec
from .retention import Retained


class LinearAttention(Retained):
    """y_t = phi(q_t) S_t / (phi(q_t) z_t) with phi = elu + 1, S the sum of phi(k)^T v and z the sum of phi(k).

    z is one more channel of S: values get a last channel of ones.
    """

    spec: LinearAttentionSpec

    def __init__(self, spec: LinearAttentionSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width, self.heads = stack.model.d_model, stack.model.n_heads
        self.spec = spec
        self.key_dim, self.value_dim = width // self.heads, width // self.heads + 1
        self.choices = (select("retention", target),)
        self.ops = self.choices[0].kernels
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def _heads(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """phi(q), phi(k) [B, T, H, K], v with its ones [B, T, H, K + 1], and the log decay, zero [H]."""
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x, layer).unflatten(-1, (self.heads, -1)).to(wide(x.dtype)) for layer in layers)
        none = torch.zeros(self.heads, dtype=torch.float64, device=x.device)
        return F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0), none

    def _out(self, x: Tensor, y: Tensor, segments: Segments) -> Tensor:
        total, weight = y[..., :-1], y[..., -1:]
        y = total / torch.where(weight > 0, weight, 1)  # padding has seen nothing
        return segments.mask(project(y.to(x.dtype).flatten(2), self.o_proj))

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        for name, layer in self.named_children():
            init_linear(layer, out_scale if name == "o_proj" else 1.0)
