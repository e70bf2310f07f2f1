"""Multi-scale retention (Sun et al. 2023, arXiv 2307.08621): linear attention with RoPE and a decay a head."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.precision import wide
from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear, matmul_flops
from ..layers.linear import project, project_each
from ..layers.norm import layer_norm
from ..layers.precision import FullPrecision
from ..layers.rope import make_rope, phases, rotate
from ..layers.share import WHOLE, Share, Split, columns
from ..segments import Segments
from ..spec import LinearAttentionSpec, RetNetSpec, StackSpec
from ..state import RetentionState
from .base import Mixer, check_one_token, checked, continued, placed, score_scale

GROUP_NORM_EPS = 1e-6
GATE_ROOT = 16.0


def log_gamma(schedule: str | float, heads: int, device: torch.device | str | None = None) -> Tensor:
    """[H] float64 log decays: `eq8` is gamma = 1 - 2^(-5-h); `paper_runs` spaces 1 - gamma from 1/32 to 1/512.

    A number is gamma in all heads.
    """
    if isinstance(schedule, float):
        return torch.full((heads,), schedule, dtype=torch.float64, device=device).log()
    if schedule == "eq8":
        forgotten = torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64, device=device))
    else:
        forgotten = torch.linspace(-math.log(32), -math.log(512), heads, dtype=torch.float64, device=device).exp()
    return torch.log1p(-forgotten)


class Decay(nn.Module):
    """log gamma: [H] where it is fixed or learned, [B, T, H] where each token has its own.

    `gated` is sigmoid(x W)^(1/16), the gated retention of YOCO (Sun et al. 2024, arXiv 2405.05254).
    """

    def __init__(self, gamma: str | float, width: int, heads: int) -> None:
        super().__init__()
        self.gamma, self.heads, self.share = gamma, heads, WHOLE
        self.learned = FullPrecision({"gamma": (heads,)}) if gamma == "learned" else None
        self.gamma_proj = nn.Linear(width, heads, bias=False) if gamma == "gated" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.learned is not None:
            return F.logsigmoid(self.learned.tensor("gamma"))
        if self.gamma_proj is not None:
            return F.logsigmoid(project(x, self.gamma_proj).to(wide(x.dtype))) / GATE_ROOT
        return self.share.part(log_gamma(self.gamma, self.heads, x.device))

    def reset_parameters(self) -> None:
        """A learned gamma starts at equation 8's; its parameter is the logit."""
        if self.learned is not None:
            with torch.no_grad():
                log = log_gamma("eq8", self.heads)
                self.learned.get_parameter("gamma").copy_(log - torch.log(-torch.expm1(log)))
        if self.gamma_proj is not None:
            init_linear(self.gamma_proj)


class Retained(Mixer[RetentionState]):
    """The forms of a mixer whose memory is retention's: a decayed sum of k^T v for each head."""

    spec: RetNetSpec | LinearAttentionSpec
    ops: Any  # the kernels of retention
    heads: int
    key_dim: int
    value_dim: int
    chunked = True

    @abstractmethod
    def _heads(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K], v [B, T, H, V] and log gamma [H] or [B, T, H]."""

    @abstractmethod
    def _out(self, x: Tensor, y: Tensor, segments: Segments) -> Tensor:
        """The mixer's output [B, T, D] for what was retained, y [B, T, H, V]."""

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        segments = placed(segments, x)
        return self._out(x, self.ops.parallel(*self._heads(x, segments), segments), segments)

    def chunkwise(
        self, x: Tensor, state: RetentionState, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, RetentionState]:
        segments, size = continued(segments), checked(chunk_size, self.spec.chunk_size)
        y, kv = self.ops.chunkwise(*self._heads(x, segments), state.kv, segments, size)
        return self._out(x, y, segments), RetentionState(kv)

    def recurrent(
        self, x: Tensor, state: RetentionState, segments: Segments | None = None
    ) -> tuple[Tensor, RetentionState]:
        check_one_token(x)
        segments = continued(segments)
        y, kv = self.ops.recurrent(*self._heads(x, segments), state.kv, segments)
        return self._out(x, y, segments), RetentionState(kv)

    def split(self, share: Share) -> Split:
        """By heads."""
        self.share, self.heads = share, share.divided(self.heads, "model.n_heads")
        return {**columns(f"{name}_proj.weight" for name in "qkvg"), "o_proj.weight": 1}

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> RetentionState:
        device, dtype = self.placement(device, dtype)
        shape = (batch, self.heads, self.key_dim, self.value_dim)
        return RetentionState(torch.zeros(shape, device=device, dtype=wide(dtype)))

    def flops(self, tokens: int) -> int:
        """Per token and head: scores and their sum over half a chunk, feeding and reading the state."""
        span = min(self.spec.chunk_size, tokens) if self.chunked else tokens
        within = span * (self.key_dim + self.value_dim)
        across = 4 * self.key_dim * self.value_dim if span < tokens else 0
        return matmul_flops(self, tokens) + tokens * self.heads * (within + across)


class Retention(Retained):
    """MSR(x) = (swish(x Wg) * GroupNorm(heads)) Wo; 1 / sqrt(K) is on q, so that the state is unscaled.

    The norm takes any scale out again, but for its epsilon; without it, muP's 1 / K matters as in attention.
    """

    spec: RetNetSpec

    def __init__(self, spec: RetNetSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width, self.heads = stack.model.d_model, stack.model.n_heads
        self.spec, self.chunked = spec, spec.chunkwise
        value = spec.value_width(width)
        self.key_dim, self.value_dim = width // self.heads, value // self.heads
        self.scale = score_scale(self.key_dim, stack.model.base.head_dim)
        self.choices = (select("retention", target, head_dim=self.key_dim, value_dim=self.value_dim),)
        self.ops = self.choices[0].kernels
        self.rope = make_rope(stack.embedding, stack.model.max_seq_len, self.key_dim) if spec.rope else None
        self.decay = Decay(spec.gamma, width, self.heads)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, value, bias=False)
        self.g_proj = nn.Linear(width, value, bias=False) if spec.swish_gate else None
        self.o_proj = nn.Linear(value, width, bias=False)

    def dynamics(self, x: Tensor, segments: Segments) -> dict[str, Tensor]:
        return {"decay": self.decay(x).exp()}

    def split(self, share: Share) -> Split:
        self.decay.share = share
        return {**super().split(share), "decay.learned.gamma": 0, "decay.gamma_proj.weight": 0}

    def _heads(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K], v [B, T, H, V] and log gamma [H] or [B, T, H]."""
        q, k, v = project_each(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.unflatten(-1, (self.heads, self.key_dim)) * self.scale
        k = k.unflatten(-1, (self.heads, self.key_dim))
        v = v.unflatten(-1, (self.heads, self.value_dim))
        if self.rope is not None:
            turn = phases(segments, self.rope, x.dtype)
            q, k = rotate(q, *turn), rotate(k, *turn)
        return q, k, v, self.decay(x)

    def _out(self, x: Tensor, y: Tensor, segments: Segments) -> Tensor:
        if self.spec.group_norm:
            y = layer_norm(y, GROUP_NORM_EPS)
        y = y.to(x.dtype).flatten(2)
        if self.g_proj is not None:
            y = F.silu(project(x, self.g_proj)) * y
        return segments.mask(project(y, self.o_proj))

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        self.decay.reset_parameters()
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                init_linear(layer, out_scale if name == "o_proj" else 1.0)
