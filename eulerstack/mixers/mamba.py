"""What both Mambas share: a short convolution, a state space behind it, and how they are drawn."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.precision import FullPrecision
from ..segments import Segments
from ..spec import Mamba1Spec, Mamba2Spec
from ..state import SSMState
from .base import Mixer, check_one_token, checked, continued, placed

DT_RANGE = (1e-3, 1e-1)
DT_FLOOR = 1e-4


class ShortConv(nn.Module):
    """The filters of `channels` channels, `width` taps each; the mixer joins several and runs them at once."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class StateSpace(FullPrecision):
    """A = -exp(A_log), the skip D, and the bias of dt: [H] each in Mamba-2; [D, N], [D] and [D] in Mamba-1."""

    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter

    @torch.no_grad()
    def draw_dt(self) -> None:
        """dt log-uniform in [1e-3, 0.1] through an inverse softplus; D = 1."""
        low, high = map(math.log, DT_RANGE)
        dt = torch.empty_like(self.dt_bias).uniform_(low, high).exp().clamp(min=DT_FLOOR)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        nn.init.ones_(self.D)


class Mamba(Mixer[SSMState]):
    """The forms of a state space whose inputs pass a short convolution."""

    chunked = True
    spec: Mamba1Spec | Mamba2Spec
    ops: Any  # the kernels of the state space

    @abstractmethod
    def _inputs(self, x: Tensor, conv: Tensor, segments: Segments) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the state space takes, x first, and the convolution's state."""

    @abstractmethod
    def _out(self, x: Tensor, y: Tensor, values: Tensor, segments: Segments) -> Tensor:
        """The mixer's output [B, T, D] for the state space's y and the x that it took."""

    def dynamics(self, x: Tensor, segments: Segments) -> dict[str, Tensor]:
        empty = self.init_state(x.shape[0], 0, x.device, x.dtype).conv
        (_, dt, A, *_), _ = self._inputs(x, empty, segments)
        return {"dt": dt, "decay": torch.exp(dt.reshape(*dt.shape, *[1] * (A.dim() - 1)) * A)}

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        segments = placed(segments, x)
        empty = self.init_state(x.shape[0], 0, x.device, x.dtype).conv
        inputs, _ = self._inputs(x, empty, segments)
        return self._out(x, self.ops.parallel(*inputs, segments), inputs[0], segments)

    def chunkwise(
        self, x: Tensor, state: SSMState, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, SSMState]:
        segments, size = continued(segments), checked(chunk_size, self.spec.chunk_size)
        inputs, conv = self._inputs(x, state.conv, segments)
        y, ssm = self.ops.chunkwise(*inputs, state.ssm, segments, size)
        return self._out(x, y, inputs[0], segments), SSMState(ssm, conv)

    def recurrent(self, x: Tensor, state: SSMState, segments: Segments | None = None) -> tuple[Tensor, SSMState]:
        check_one_token(x)
        segments = continued(segments)
        inputs, conv = self._inputs(x, state.conv, segments)
        y, ssm = self.ops.recurrent(*inputs, state.ssm, segments)
        return self._out(x, y, inputs[0], segments), SSMState(ssm, conv)
