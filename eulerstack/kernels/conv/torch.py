"""The short convolution in PyTorch: W shifted products, faster on a CPU than its depthwise convolution."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from ...segments import Segments
from ..provider import Provider, anywhere


def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state` [B, W-1, D]. Returns silu(y) [B, T, D] and the document's last W - 1 inputs."""
    kept = weight.shape[1] - 1
    if segments.plain:
        y: Tensor = _SiluOfShiftedProducts.apply(x, state.to(x.dtype), weight, bias)
        recent = x[:, -kept:].to(state.dtype, copy=True)  # no view: it would keep all of x alive
        return y, recent if recent.shape[1] == kept else torch.cat([state, recent], 1)[:, -kept:]
    inputs, label = joined(x, state, segments)
    y = silu(_shifted_products(inputs, label, weight) + bias)
    return y, kept_inputs(inputs, label, segments, kept).to(state.dtype)


def joined(x: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """inputs [B, W-1+T, D] with the state right before each row's first real token, and their labels."""
    kept = state.shape[1]
    slots = segments.first[:, None] + torch.arange(kept, device=x.device)
    inputs = torch.nn.functional.pad(segments.mask(x), (0, 0, kept, 0))
    inputs = inputs.scatter_add(1, slots[..., None].expand_as(state), state.to(x.dtype))
    label = torch.nn.functional.pad(segments.label, (kept, 0), value=-1)
    return inputs, label.scatter(1, slots, torch.zeros_like(slots))


def _shifted_products(inputs: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Only inputs of a token's own document enter its window."""
    width = weight.shape[1]
    tokens = inputs.shape[1] - width + 1
    own = label[:, width - 1 :]
    total = torch.zeros_like(inputs[:, :tokens])
    for tap in range(width):
        seen = (label[:, tap : tap + tokens] == own)[..., None]
        total = total + torch.where(seen, inputs[:, tap : tap + tokens], 0) * weight[:, tap]
    return total


def kept_inputs(inputs: Tensor, label: Tensor, segments: Segments, kept: int) -> Tensor:
    """The W - 1 inputs up to each row's last real token, zero where they are of another document."""
    slots = (segments.first + segments.count)[:, None] + torch.arange(kept, device=inputs.device)
    same = label.gather(1, slots) == segments.running[:, -1:]
    return torch.where(same[..., None], inputs.gather(1, slots[..., None].expand(-1, -1, inputs.shape[2])), 0)


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
