"""The short convolution in PyTorch: W shifted products, faster on a CPU than its depthwise convolution."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from ...segments import Segments
from ..open_length import is_open
from ..provider import Provider, anywhere
from .windows import joined, kept_inputs, shifted_products


def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state` [B, W-1, D]. Returns silu(y) [B, T, D] and the document's last W - 1 inputs."""
    kept = weight.shape[1] - 1
    if segments.plain and is_open(x.shape[1]):
        return _open_convolution(x, weight, bias, state)
    if segments.plain:
        y: Tensor = _SiluOfShiftedProducts.apply(x, state.to(x.dtype), weight, bias)
        recent = x[:, -kept:].to(state.dtype, copy=True)  # no view: it would keep all of x alive
        return y, recent if recent.shape[1] == kept else torch.cat([state, recent], 1)[:, -kept:]
    inputs, label = joined(x, state, segments)
    y = silu(shifted_products(inputs, label, weight) + bias)
    return y, kept_inputs(inputs, label, segments, kept).to(state.dtype)


def _open_convolution(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a number that is not known yet: it may be less than the state's."""
    inputs = torch.cat([state.to(x.dtype), x], 1)
    token, slot = (torch.arange(count, device=x.device) for count in (x.shape[1], state.shape[1]))
    y = bias + sum(inputs[:, token + tap] * weight[:, tap] for tap in range(weight.shape[1]))
    return silu(y), inputs[:, slot + x.shape[1]].to(state.dtype)


class _SiluOfShiftedProducts(torch.autograd.Function):
    """silu(bias + sum over lags of x_{t - lag} * weight[:, W-1-lag]), keeping only the sum for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = torch.addcmul(bias, x, weight[:, -1])
        for lag in range(1, weight.shape[1]):
            tap = weight[:, -1 - lag]
            total[:, lag:].addcmul_(x[:, :-lag], tap)
            total[:, :lag].addcmul_(_before(state, lag, x.shape[1]), tap)
        ctx.save_for_backward(x, state, weight, total)
        return silu(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, state, weight, total = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grads[0], total)
        for_x, for_state, for_weight = grad * weight[:, -1], torch.zeros_like(state), torch.empty_like(weight)
        for_weight[:, -1] = _inner(grad, x)
        for lag in range(1, weight.shape[1]):
            tap, reach = weight[:, -1 - lag], grad[:, :lag]
            for_x[:, :-lag].addcmul_(grad[:, lag:], tap)
            _before(for_state, lag, x.shape[1]).addcmul_(reach, tap)
            for_weight[:, -1 - lag] = _inner(grad[:, lag:], x[:, :-lag]) + _inner(
                reach, _before(state, lag, x.shape[1])
            )
        return for_x, for_state, for_weight, grad.sum((0, 1))


def _before(state: Tensor, lag: int, tokens: int) -> Tensor:
    """What the first tokens of a call see `lag` places back, where that is in the state."""
    start = state.shape[1] - lag
    return state[:, start : start + tokens]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((0, 1))


PROVIDER = Provider(convolve, anywhere)
