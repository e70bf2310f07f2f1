"""What each token of a row with padding and documents sees of its past: the inputs a short convolution needs."""

import torch
from torch import Tensor

from ...segments import Segments


def joined(x: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """inputs [B, W-1+T, D] with the state right before each row's first real token, and their labels."""
    kept = state.shape[1]
    slots = segments.first[:, None] + torch.arange(kept, device=x.device)
    inputs = torch.nn.functional.pad(segments.mask(x), (0, 0, kept, 0))
    inputs = inputs.scatter_add(1, slots[..., None].expand_as(state), state.to(x.dtype))
    label = torch.nn.functional.pad(segments.label, (kept, 0), value=-1)
    return inputs, label.scatter(1, slots, torch.zeros_like(slots))


def kept_inputs(inputs: Tensor, label: Tensor, segments: Segments, kept: int) -> Tensor:
    """The W - 1 inputs up to each row's last real token, zero where they are of another document."""
    slots = (segments.first + segments.count)[:, None] + torch.arange(kept, device=inputs.device)
    same = label.gather(1, slots) == segments.running[:, -1:]
    return torch.where(same[..., None], inputs.gather(1, slots[..., None].expand(-1, -1, inputs.shape[2])), 0)


def shifted_products(inputs: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Only inputs of a token's own document enter its window."""
    width = weight.shape[1]
    tokens = inputs.shape[1] - width + 1
    own = label[:, width - 1 :]
    total = torch.zeros_like(inputs[:, :tokens])
    for tap in range(width):
        seen = (label[:, tap : tap + tokens] == own)[..., None]
        total = total + torch.where(seen, inputs[:, tap : tap + tokens], 0) * weight[:, tap]
    return total


def taps_of(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """The convolution without its activation: y [B, T, D] and the document's last W - 1 inputs."""
    kept, tokens = weight.shape[1] - 1, x.shape[1]
    if not segments.plain:
        inputs, label = joined(x, state, segments)
        after = kept_inputs(inputs, label, segments, kept).to(state.dtype)
        return shifted_products(inputs, label, weight) + bias, after
    inputs = torch.cat([state.to(x.dtype), x], 1)
    y = sum((inputs[:, tap : tap + tokens] * weight[:, tap] for tap in range(kept + 1)), bias)
    return y, inputs[:, tokens:].to(state.dtype, copy=True)
