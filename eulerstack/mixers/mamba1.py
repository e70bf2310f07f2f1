"""Mamba-1 (Gu and Dao 2023, arXiv 2312.00752): a short convolution, and a selective scan of every channel by itself."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.precision import wide
from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear, matmul_flops, swiglu
from ..layers.linear import project
from ..layers.share import Share, Split, columns
from ..segments import Segments
from ..spec import Mamba1Spec, StackSpec
from ..state import SSMState
from .mamba import Mamba, ShortConv, StateSpace


class Mamba1(Mamba):
    """B, C and dt depend on the convolved x; dt is of low rank. Weights are stored apart, to be split by channel."""

    spec: Mamba1Spec

    def __init__(self, spec: Mamba1Spec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width = stack.model.d_model
        self.spec = spec
        self.inner, self.rank = inner, rank = spec.inner_width(width), spec.rank(width)
        conv = select("conv", target, width=spec.d_conv, channels=inner)
        self.choices = (select("selective_scan", target, numbers=spec.d_state), conv)
        self.ops, self.conv = (choice.kernels for choice in self.choices)
        self.z_proj = nn.Linear(width, inner, bias=False)
        self.x_proj = nn.Linear(width, inner, bias=False)
        self.x_conv = ShortConv(inner, spec.d_conv)
        self.rank_proj = nn.Linear(inner, rank, bias=False)
        self.B_proj = nn.Linear(inner, spec.d_state, bias=False)
        self.C_proj = nn.Linear(inner, spec.d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.scan = StateSpace({"A_log": (inner, spec.d_state), "D": (inner,), "dt_bias": (inner,)})
        self.out_proj = nn.Linear(inner, width, bias=False)

    def _inputs(self, x: Tensor, conv: Tensor, segments: Segments) -> tuple[tuple[Tensor, ...], Tensor]:
        """(x, dt [B, T, D], A [D, N], B, C [B, T, N]), D the inner width, and the convolution's state."""
        taps, scan = self.x_conv, self.scan
        values = project(x, self.x_proj)
        values, conv = self.conv(values, taps.weight.to(x.dtype), taps.bias.to(x.dtype), conv, segments)
        widths = [self.rank, self.spec.d_state, self.spec.d_state]
        shared = self.share.total(project(values, self.rank_proj, self.B_proj, self.C_proj))
        low, B, C = shared.split(widths, -1)
        dt = F.softplus(project(low, self.dt_proj).to(wide(x.dtype)) + scan.dt_bias)
        return (values, dt, -torch.exp(scan.A_log), B, C), conv

    def _out(self, x: Tensor, y: Tensor, values: Tensor, segments: Segments) -> Tensor:
        y = torch.addcmul(y, values.to(y.dtype), self.scan.D).to(x.dtype)
        return segments.mask(project(swiglu(project(x, self.z_proj), y), self.out_proj))

    def split(self, share: Share) -> Split:
        """By channels: what a token's B, C and dt are made of is summed over the ranks."""
        self.share = share
        self.inner = share.divided(self.inner, "the inner width of mamba, expand x model.d_model")
        names = ("z_proj.weight", "x_proj.weight", "dt_proj.weight", "x_conv.weight", "x_conv.bias")
        rows = (f"{name}_proj.weight" for name in ("rank", "B", "C", "out"))
        return {**columns((*names, "scan.A_log", "scan.D", "scan.dt_bias")), **dict.fromkeys(rows, 1)}

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> SSMState:
        device, dtype = self.placement(device, dtype)
        ssm = torch.zeros(batch, self.inner, self.spec.d_state, device=device, dtype=wide(dtype))
        return SSMState(ssm, torch.zeros(batch, self.spec.d_conv - 1, self.inner, device=device, dtype=dtype))

    def flops(self, tokens: int) -> int:
        """The projections, and per token and channel the taps and 7 for each of N numbers of state.

        Those are dt A and its exponential, x dt B, a multiply-add into the state, and one out of it (3 + 2 + 2).
        """
        spec = self.spec
        return matmul_flops(self, tokens) + tokens * self.inner * (2 * spec.d_conv + 7 * spec.d_state)

    @torch.no_grad()
    def reset_parameters(self, out_scale: float = 1.0) -> None:
        """A = -1, -2, ..., -N."""
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                init_linear(layer, out_scale if name == "out_proj" else 1.0)
        self.x_conv.reset_parameters()
        numbers = torch.arange(1, self.spec.d_state + 1, dtype=torch.float64, device=self.scan.A_log.device)
        self.scan.A_log.copy_(numbers.log().expand_as(self.scan.A_log))
        self.scan.draw_dt()
