"""The short convolution by causal-conv1d's CUDA kernels: a call's inputs behind the state, documents by `seq_idx`."""

from typing import Any

import torch
from causal_conv1d import causal_conv1d_fn
from torch import Tensor

from ...segments import Segments
from ..precision import without_autocast
from ..provider import Provider, Target, on_gpu
from .windows import joined, kept_inputs


@without_autocast
def convolve(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state` [B, W-1, D]. Returns silu(y) [B, T, D] and the document's last W - 1 inputs."""
    kept = weight.shape[1] - 1
    if segments.plain:
        inputs, documents = torch.cat([state.to(x.dtype), x], 1), None
        after = inputs[:, x.shape[1] :].to(state.dtype, copy=True)
    else:
        inputs, label = joined(x, state, segments)
        after = kept_inputs(inputs, label, segments, kept).to(state.dtype)
        documents = (label + 1).to(torch.int32).contiguous()
    channels_last = inputs.contiguous().transpose(1, 2)  # the layout that seq_idx asks for
    y: Tensor = causal_conv1d_fn(channels_last, weight.to(x.dtype), bias.to(x.dtype), documents, activation="silu")
    return y.transpose(1, 2)[:, kept:], after


def refuses(target: Target, *, width: int = 4, channels: int = 8, **needs: Any) -> str | None:
    """They were compiled for 2 to 4 taps, and read eight channels at once."""
    if not 2 <= width <= 4:
        return f"has 2 to 4 taps, not d_conv = {width}"
    return f"takes multiples of 8 channels, not {channels}" if channels % 8 else on_gpu(target)


PROVIDER = Provider(convolve, refuses)
