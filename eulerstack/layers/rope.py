"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout."""

import torch
from torch import Tensor

from ..kernels.precision import wide
from ..segments import Segments


def phases(segments: Segments, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, T, 1, dim / 2] of position * theta^(-2 i / dim), at least float32.

    The angles are float64: in float32 they are off by 7e-2 at a million tokens.
    """
    return segments.once(("phases", dim, theta, wide(dtype)), lambda: _phases(segments, dim, theta, wide(dtype)))  # type: ignore[no-any-return]


def _phases(segments: Segments, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert segments.position is not None
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=segments.position.device) / -dim
    angle = segments.position.double()[..., None, None] * theta**exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, K] turned by the phases, channel i paired with channel i + K / 2."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)
