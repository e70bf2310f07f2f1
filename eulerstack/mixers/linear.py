"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), normalised: retention without a decay."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.precision import wide
from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear, matmul_flops
from ..segments import Segments
from ..spec import LinearAttentionSpec, StackSpec
from ..state import RetentionState
from .base import Mixer, check_one_token, checked, continued, placed


class LinearAttention(Mixer[RetentionState]):
    """y_t = phi(q_t) S_t / (phi(q_t) z_t) with phi = elu + 1, S the sum of phi(k)^T v and z the sum of phi(k).

    z is one more channel of S: values get a last channel of ones.
    """

    def __init__(self, spec: LinearAttentionSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width, self.heads = stack.model.d_model, stack.model.n_heads
        self.spec, self.key_dim = spec, width // self.heads
        self.choices = (select("retention", target),)
        self.ops = self.choices[0].kernels
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        state = self.init_state(x.shape[0], 0, x.device, x.dtype)
        return self.chunkwise(x, state, placed(segments, x))[0]

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        segments = placed(segments, x)
        return self._out(self.ops.parallel(*self._heads(x), segments), x, segments)

    def chunkwise(
        self, x: Tensor, state: RetentionState, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, RetentionState]:
        segments, size = continued(segments), checked(chunk_size, self.spec.chunk_size)
        y, kv = self.ops.chunkwise(*self._heads(x), state.kv, segments, size)
        return self._out(y, x, segments), RetentionState(kv)

    def recurrent(
        self, x: Tensor, state: RetentionState, segments: Segments | None = None
    ) -> tuple[Tensor, RetentionState]:
        check_one_token(x)
        segments = continued(segments)
        y, kv = self.ops.recurrent(*self._heads(x), state.kv, segments)
        return self._out(y, x, segments), RetentionState(kv)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """phi(q), phi(k) [B, T, H, K], v with its ones [B, T, H, K + 1], and the log decay, zero [H]."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).to(wide(x.dtype)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        none = torch.zeros(self.heads, dtype=torch.float64, device=x.device)
        return F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0), none

    def _out(self, y: Tensor, x: Tensor, segments: Segments) -> Tensor:
        total, weight = y[..., :-1], y[..., -1:]
        y = total / torch.where(weight > 0, weight, 1)  # padding has seen nothing
        return segments.mask(self.o_proj(y.to(x.dtype).flatten(2)))

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> RetentionState:
        weight = self.q_proj.weight
        shape = (batch, self.heads, self.key_dim, self.key_dim + 1)
        return RetentionState(torch.zeros(shape, device=device or weight.device, dtype=wide(dtype or weight.dtype)))

    def flops(self, tokens: int) -> int:
        """Per token and head: scores and their sum over half a chunk, feeding and reading the state."""
        span, value = min(self.spec.chunk_size, tokens), self.key_dim + 1
        across = 4 * self.key_dim * value if span < tokens else 0
        return matmul_flops(self, tokens) + tokens * self.heads * (span * (self.key_dim + value) + across)

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        for name, layer in self.named_children():
            init_linear(layer, out_scale if name == "o_proj" else 1.0)
