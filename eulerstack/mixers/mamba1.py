"""Mamba-1 (Gu and Dao 2023, arXiv 2312.00752): a short convolution, and a selective scan of every channel by itself."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.precision import wide
from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear, matmul_flops, swiglu
from ..layers.precision import FullPrecision
from ..segments import Segments
from ..spec import Mamba1Spec, StackSpec
from ..state import SSMState
from .base import Mixer, check_one_token, checked, continued, placed
from .mamba2 import DT_FLOOR, DT_RANGE, ShortConv


class SelectiveScan(FullPrecision):
    """The state space's own parameters: A = -exp(A_log) [D, N], the skip D [D], and the bias of dt [D]."""

    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter


class Mamba1(Mixer[SSMState]):
    """B, C and dt depend on the convolved x; dt is of low rank. Weights are stored apart, to be split by channel."""

    def __init__(self, spec: Mamba1Spec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width = stack.model.d_model
        self.spec = spec
        self.choices = (select("selective_scan", target), select("conv", target))
        self.selective_scan, self.conv = (choice.kernels for choice in self.choices)
        inner, rank = spec.inner_width(width), spec.rank(width)
        self.z_proj = nn.Linear(width, inner, bias=False)
        self.x_proj = nn.Linear(width, inner, bias=False)
        self.x_conv = ShortConv(inner, spec.d_conv)
        self.rank_proj = nn.Linear(inner, rank, bias=False)
        self.B_proj = nn.Linear(inner, spec.d_state, bias=False)
        self.C_proj = nn.Linear(inner, spec.d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.scan = SelectiveScan({"A_log": (inner, spec.d_state), "D": (inner,), "dt_bias": (inner,)})
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        state = self.init_state(x.shape[0], 0, x.device, x.dtype)
        return self.chunkwise(x, state, placed(segments, x))[0]

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        segments = placed(segments, x)
        empty = self.init_state(x.shape[0], 0, x.device, x.dtype).conv
        inputs, _ = self._inputs(x, empty, segments)
        return self._out(x, self.selective_scan.parallel(*inputs, segments), inputs[0], segments)

    def chunkwise(
        self, x: Tensor, state: SSMState, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, SSMState]:
        segments, size = continued(segments), checked(chunk_size, self.spec.chunk_size)
        inputs, conv = self._inputs(x, state.conv, segments)
        y, ssm = self.selective_scan.chunkwise(*inputs, state.ssm, segments, size)
        return self._out(x, y, inputs[0], segments), SSMState(ssm, conv)

    def recurrent(self, x: Tensor, state: SSMState, segments: Segments | None = None) -> tuple[Tensor, SSMState]:
        check_one_token(x)
        segments = continued(segments)
        inputs, conv = self._inputs(x, state.conv, segments)
        y, ssm = self.selective_scan.recurrent(*inputs, state.ssm, segments)
        return self._out(x, y, inputs[0], segments), SSMState(ssm, conv)

    def _inputs(self, x: Tensor, conv: Tensor, segments: Segments) -> tuple[tuple[Tensor, ...], Tensor]:
        """(x, dt [B, T, D], A [D, N], B, C [B, T, N]), D the inner width, and the convolution's state."""
        taps, scan = self.x_conv, self.scan
        values, conv = self.conv(self.x_proj(x), taps.weight.to(x.dtype), taps.bias.to(x.dtype), conv, segments)
        weight = torch.cat([self.get_parameter(f"{p}_proj.weight") for p in ("rank", "B", "C")])
        low, B, C = F.linear(values, weight).split([self.dt_proj.in_features, *[self.spec.d_state] * 2], -1)
        dt = F.softplus(self.dt_proj(low).to(wide(x.dtype)) + scan.dt_bias)
        return (values, dt, -torch.exp(scan.A_log), B, C), conv

    def _out(self, x: Tensor, y: Tensor, values: Tensor, segments: Segments) -> Tensor:
        y = torch.addcmul(y, values.to(y.dtype), self.scan.D).to(x.dtype)
        return segments.mask(self.out_proj(swiglu(self.z_proj(x), y)))

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> SSMState:
        weight, spec = self.z_proj.weight, self.spec
        device, dtype = device or weight.device, dtype or weight.dtype
        inner = weight.shape[0]
        ssm = torch.zeros(batch, inner, spec.d_state, device=device, dtype=wide(dtype))
        return SSMState(ssm, torch.zeros(batch, spec.d_conv - 1, inner, device=device, dtype=dtype))

    def flops(self, tokens: int) -> int:
        """The projections, and per token and channel the taps and 7 for each of N numbers of state.

        Those are dt A and its exponential, x dt B, a multiply-add into the state, and one out of it (3 + 2 + 2).
        """
        spec = self.spec
        return matmul_flops(self, tokens) + tokens * self.z_proj.out_features * (2 * spec.d_conv + 7 * spec.d_state)

    @torch.no_grad()
    def reset_parameters(self, out_scale: float = 1.0) -> None:
        """A = -1, -2, ..., -N; dt log-uniform in [1e-3, 0.1] through an inverse softplus; D = 1."""
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                init_linear(layer, out_scale if name == "out_proj" else 1.0)
        self.x_conv.reset_parameters()
        numbers = torch.arange(1, self.spec.d_state + 1, dtype=torch.float64, device=self.scan.A_log.device)
        self.scan.A_log.copy_(numbers.log().expand_as(self.scan.A_log))
        low, high = map(math.log, DT_RANGE)
        dt = torch.empty_like(self.scan.dt_bias).uniform_(low, high).exp().clamp(min=DT_FLOOR)
        self.scan.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        nn.init.ones_(self.scan.D)
