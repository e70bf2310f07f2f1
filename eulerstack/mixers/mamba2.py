"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a short convolution, a selective state space, a gated norm."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.precision import wide
from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear, matmul_flops
from ..layers.linear import project
from ..layers.norm import RMSNorm
from ..layers.share import Share, Split, columns
from ..segments import Segments
from ..spec import Mamba2Spec, StackSpec
from ..state import SSMState
from .mamba import Mamba, ShortConv, StateSpace

A_RANGE = (1.0, 16.0)


class Mamba2(Mamba):
    """z, x, B, C and dt are projected by weights stored apart, so that heads can be split across devices."""

    spec: Mamba2Spec

    def __init__(self, spec: Mamba2Spec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width = stack.model.d_model
        self.spec = spec
        self.groups = spec.n_groups
        inner, shared = spec.inner_width(width), spec.n_groups * spec.d_state
        conv = select("conv", target, width=spec.d_conv, channels=inner + 2 * shared)
        self.choices = (select("ssd", target, numbers=spec.d_state), conv)
        self.ops, self.conv = (choice.kernels for choice in self.choices)
        self.heads = inner // spec.head_dim
        self.z_proj = nn.Linear(width, inner, bias=False)
        self.x_proj = nn.Linear(width, inner, bias=False)
        self.B_proj = nn.Linear(width, shared, bias=False)
        self.C_proj = nn.Linear(width, shared, bias=False)
        self.dt_proj = nn.Linear(width, self.heads, bias=False)
        self.x_conv = ShortConv(inner, spec.d_conv)
        self.B_conv = ShortConv(shared, spec.d_conv)
        self.C_conv = ShortConv(shared, spec.d_conv)
        self.scan = StateSpace(dict.fromkeys(("A_log", "D", "dt_bias"), (self.heads,)))
        self.norm = RMSNorm(inner, spec.n_groups)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def _inputs(self, x: Tensor, conv: Tensor, segments: Segments) -> tuple[tuple[Tensor, ...], Tensor]:
        """(x [B, T, H, P], dt [B, T, H], A [H], B, C [B, T, G, N]) and the convolution's state."""
        values = project(x, self.x_proj, self.B_proj, self.C_proj)
        convs = (self.x_conv, self.B_conv, self.C_conv)
        taps, bias = torch.cat([conv.weight for conv in convs]), torch.cat([conv.bias for conv in convs])
        mixed, conv = self.conv(values, taps.to(x.dtype), bias.to(x.dtype), conv, segments)
        shared = self.groups * self.spec.d_state
        values, B, C = mixed.split([self.heads * self.spec.head_dim, shared, shared], -1)
        scan = self.scan
        dt = F.softplus(project(x, self.dt_proj).to(wide(x.dtype)) + scan.dt_bias)
        B, C = (t.unflatten(-1, (self.groups, self.spec.d_state)) for t in (B, C))
        return (values.unflatten(-1, (self.heads, self.spec.head_dim)), dt, -torch.exp(scan.A_log), B, C), conv

    def _out(self, x: Tensor, y: Tensor, values: Tensor, segments: Segments) -> Tensor:
        y = torch.addcmul(y, values.to(y.dtype), self.scan.D[:, None]).to(x.dtype).flatten(2)
        gate = F.silu(project(x, self.z_proj))
        y = self.norm(y) * gate if self.spec.norm_before_gate else self.norm(y * gate)
        return segments.mask(project(y, self.out_proj))

    def split(self, share: Share) -> Split:
        """By heads, with their groups; a single group's B and C are held whole, and its norm is over all ranks."""
        self.share, self.heads = share, share.divided(self.heads, "the number of mamba's heads")
        names = ["z_proj.weight", "x_proj.weight", "dt_proj.weight", "x_conv.weight", "x_conv.bias", "norm.weight"]
        if self.groups == 1:
            self.norm.share = share
        else:
            self.groups = self.norm.groups = share.divided(self.groups, "mamba.n_groups")
            names += [f"{name}.{part}" for name in ("B_conv", "C_conv") for part in ("weight", "bias")]
            names += ["B_proj.weight", "C_proj.weight"]
        return {**columns((*names, "scan.A_log", "scan.D", "scan.dt_bias")), "out_proj.weight": 1}

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> SSMState:
        (device, dtype), spec = self.placement(device, dtype), self.spec
        channels = self.heads * spec.head_dim + 2 * self.groups * spec.d_state
        ssm = torch.zeros(batch, self.heads, spec.head_dim, spec.d_state, device=device, dtype=wide(dtype))
        return SSMState(ssm, torch.zeros(batch, spec.d_conv - 1, channels, device=device, dtype=dtype))

    def flops(self, tokens: int) -> int:
        """Per token: scores a group and sums a head over half a chunk, feeding and reading the state, the taps."""
        span, spec = min(self.spec.chunk_size, tokens), self.spec
        inner = self.heads * spec.head_dim
        scores = span * (spec.n_groups * spec.d_state + inner)
        across = 4 * inner * spec.d_state if span < tokens else 0
        taps = 2 * spec.d_conv * (inner + 2 * spec.n_groups * spec.d_state)
        return matmul_flops(self, tokens) + tokens * (scores + across + taps)

    @torch.no_grad()
    def reset_parameters(self, out_scale: float = 1.0) -> None:
        """A from U(1, 16)."""
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                init_linear(layer, out_scale if name == "out_proj" else 1.0)
            elif isinstance(layer, ShortConv):
                layer.reset_parameters()
        self.scan.A_log.copy_(torch.empty_like(self.scan.A_log).uniform_(*A_RANGE).log())
        self.scan.draw_dt()
        self.norm.reset_parameters()
