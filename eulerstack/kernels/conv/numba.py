"""The short convolution in loops that Numba compiles for a CPU: forward and backward pass once over the tokens."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...segments import Segments
from ..compiled import compiled, exp, spread, view
from ..precision import wide, without_autocast
from ..provider import Provider, on_cpu
from ..tracing import unless_traced
from . import torch as reference
from .windows import joined, kept_inputs

BLOCK = 128  # channels that one thread takes through all tokens


@unless_traced(reference.convolve)
@without_autocast
def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state` [B, W-1, D]. Returns silu(y) [B, T, D] and the document's last W - 1 inputs."""
    kept, dtype = weight.shape[1] - 1, wide(x.dtype)
    if segments.plain:
        inputs, label = torch.cat([state.to(x.dtype), x], 1), None
        after = inputs[:, x.shape[1] :].to(state.dtype, copy=True)
    else:
        inputs, label = joined(x, state, segments)
        after = kept_inputs(inputs, label, segments, kept).to(state.dtype)
    if label is None and x.shape[1] == 1 and not torch.is_grad_enabled():
        y = F.silu((inputs.to(dtype) * weight.T.to(dtype)).sum(1, keepdim=True) + bias)  # too little for a loop
        return y.to(x.dtype), after
    y = _SiluOfTaps.apply(inputs.to(dtype), weight.to(dtype), bias.to(dtype), label)
    return y.to(x.dtype), after


class _SiluOfTaps(torch.autograd.Function):
    """silu(bias + sum over taps of weight[:, tap] * inputs[:, t + tap]), only over inputs of a token's own label."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, label: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias, label)
        inputs, taps = inputs.contiguous(), weight.T.contiguous()
        y = inputs.new_empty(inputs.shape[0], inputs.shape[1] - taps.shape[0] + 1, inputs.shape[2])
        spread(
            _forward_loop,
            y.shape[:2].numel(),
            *view(inputs, taps, bias.contiguous(), _labels(label), y),
            label is not None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inputs, weight, bias, label = ctx.saved_tensors
        inputs, taps = inputs.contiguous(), weight.T.contiguous()
        for_inputs, for_taps, for_bias = (torch.zeros_like(t) for t in (inputs, taps, bias))
        arrays = view(grads[0].contiguous(), inputs, taps, bias.contiguous(), _labels(label))
        spread(
            _backward_loop,
            -(-bias.shape[0] // BLOCK),
            *arrays,
            *view(for_inputs, for_taps, for_bias),
            label is not None,
        )
        return for_inputs, for_taps.T, for_bias, None


def _labels(label: Tensor | None) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.int64) if label is None else label.contiguous()


@compiled
def _forward_loop(begin: Any, end: Any, inputs: Any, taps: Any, bias: Any, label: Any, y: Any, labelled: Any) -> None:
    _, T, D = y.shape
    W = taps.shape[0]
    for at in range(begin, end):
        b, t = at // T, at % T
        to, one = y[b, t], y.dtype.type(1)
        for d in range(D):
            to[d] = bias[d]
        for tap in range(W):
            if labelled and label[b, t + tap] != label[b, t + W - 1]:
                continue
            seen, by = inputs[b, t + tap], taps[tap]
            for d in range(D):
                to[d] += seen[d] * by[d]
        for d in range(D):
            to[d] = to[d] / (one + exp(-to[d]))


@compiled
def _backward_loop(
    begin: Any, end: Any, grads: Any, inputs: Any, taps: Any, bias: Any, label: Any,
    for_inputs: Any, for_taps: Any, for_bias: Any, labelled: Any,
) -> None:  # fmt: skip
    B, T, D = grads.shape
    W = taps.shape[0]
    for block in range(begin, end):
        first, last = block * BLOCK, min(D, (block + 1) * BLOCK)
        total, one = np.empty(BLOCK, grads.dtype), grads.dtype.type(1)
        for b in range(B):
            for t in range(T):
                for d in range(last - first):
                    total[d] = bias[first + d]
                for tap in range(W):
                    if labelled and label[b, t + tap] != label[b, t + W - 1]:
                        continue
                    seen, by = inputs[b, t + tap, first:last], taps[tap, first:last]
                    for d in range(last - first):
                        total[d] += seen[d] * by[d]
                grad, summed = grads[b, t, first:last], for_bias[first:last]
                for d in range(last - first):
                    gate = one / (one + exp(-total[d]))
                    total[d] = grad[d] * gate * (one + total[d] * (one - gate))
                    summed[d] += total[d]
                for tap in range(W):
                    if labelled and label[b, t + tap] != label[b, t + W - 1]:
                        continue
                    seen, by = inputs[b, t + tap, first:last], taps[tap, first:last]
                    back, to = for_inputs[b, t + tap, first:last], for_taps[tap, first:last]
                    for d in range(last - first):
                        back[d] += total[d] * by[d]
                        to[d] += total[d] * seen[d]


PROVIDER = Provider(convolve, on_cpu)
