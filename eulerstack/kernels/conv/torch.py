"""The short convolution in PyTorch: W shifted products, faster on a CPU than its depthwise convolution."""

from typing import Any

import torch
from torch import Tensor

from ...segments import Segments


def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state` [B, W-1, D]. Returns y [B, T, D] and the last W - 1 inputs of the document."""
    kept = weight.shape[1] - 1
    if segments.plain:
        inputs = torch.cat([state.to(x.dtype), x], 1)
        y = _ShiftedProducts.apply(inputs, weight)
        return y + bias, inputs[:, inputs.shape[1] - kept :].to(state.dtype)
    inputs, label = _joined(x, state, segments)
    y = _shifted_products(inputs, label, weight)
    return y + bias, _kept(inputs, label, segments, kept).to(state.dtype)


def _joined(x: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
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


def _kept(inputs: Tensor, label: Tensor, segments: Segments, kept: int) -> Tensor:
    """The W - 1 inputs up to each row's last real token, zero where they are of another document."""
    slots = (segments.first + segments.count)[:, None] + torch.arange(kept, device=inputs.device)
    same = label.gather(1, slots) == segments.running[:, -1:]
    return torch.where(same[..., None], inputs.gather(1, slots[..., None].expand(-1, -1, inputs.shape[2])), 0)


class _ShiftedProducts(torch.autograd.Function):
    """sum over taps of inputs[:, tap : tap + T] * weight[:, tap], without keeping the products for the backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        tokens = inputs.shape[1] - weight.shape[1] + 1
        y = inputs[:, :tokens] * weight[:, 0]
        for tap in range(1, weight.shape[1]):
            y.addcmul_(inputs[:, tap : tap + tokens], weight[:, tap])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        (grad,) = grads
        tokens = grad.shape[1]
        for_inputs, for_weight = torch.zeros_like(inputs), torch.empty_like(weight)
        for tap in range(weight.shape[1]):
            for_inputs[:, tap : tap + tokens].addcmul_(grad, weight[:, tap])
            for_weight[:, tap] = (grad * inputs[:, tap : tap + tokens]).sum((0, 1))
        return for_inputs, for_weight
