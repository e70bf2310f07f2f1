"""Positions in attention: rotary embedding in the half-split layout, its scalings for long contexts, and ALiBi."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.precision import wide
from ..segments import Segments
from ..spec import EmbeddingSpec, RopeScalingSpec

YARN_FAST, YARN_SLOW = 32, 1  # turns over the original length: channels above the first keep, below the second divide


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    frequencies: the angle a token, of each of the K / 2 pairs of channels. factor: multiplies cos and sin.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0


def make_rope(embedding: EmbeddingSpec, max_seq_len: int, dim: int) -> Rope:
    """The rotation of heads of `dim` channels, scaled as the embedding says."""
    scaling, theta = embedding.rope_scaling, embedding.rope_theta
    if scaling is not None and scaling.type == "ntk":
        theta *= scaling.factor ** (dim / max(dim - 2, 1))
    plain = tuple(theta ** (-2 * i / dim) for i in range(dim // 2))
    if scaling is None or scaling.type == "ntk":
        return Rope(plain)
    if scaling.type == "linear":
        return Rope(tuple(f / scaling.factor for f in plain))
    return _yarn(plain, theta, scaling, max_seq_len)


def _yarn(plain: tuple[float, ...], theta: float, scaling: RopeScalingSpec, max_seq_len: int) -> Rope:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow channels are divided, fast ones kept, a ramp lies between."""
    original = scaling.original_max_seq_len or max_seq_len / scaling.factor
    dim = 2 * len(plain)

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(channel(YARN_FAST)), 0), min(math.ceil(channel(YARN_SLOW)), dim - 1)
    width = high - low or 1e-3
    slow = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]
    scaled = tuple(f * (1 - s) + f / scaling.factor * s for f, s in zip(plain, slow, strict=True))
    return Rope(scaled, 0.1 * math.log(scaling.factor) + 1)


def phases(segments: Segments, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, T, 1, K / 2] of position * frequency, at least float32.

    The angles are float64: in float32 they are off by 7e-2 at a million tokens.
    """
    return segments.once(("phases", rope, wide(dtype)), lambda: _phases(segments, rope, wide(dtype)))  # type: ignore[no-any-return]


def _phases(segments: Segments, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert segments.position is not None
    angle = segments.position.double()[..., None, None] * _frequencies(rope, segments.position.device)
    return (angle.cos() * rope.factor).to(dtype), (angle.sin() * rope.factor).to(dtype)


def _frequencies(rope: Rope, device: torch.device) -> Tensor:
    """[K / 2] float64. On a GPU they are kept: a step that copies from the host cannot be captured."""
    found = _KEPT.get((rope, device))
    if found is None:
        with torch.inference_mode(False):
            found = torch.tensor(rope.frequencies, dtype=torch.float64, device=device)
        if device.type == "cuda" and type(found) is Tensor:  # and no fake, whose time is short
            _KEPT[rope, device] = found
    return found


_KEPT: dict[tuple[Rope, torch.device], Tensor] = {}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, K] turned by the phases, channel i paired with channel i + K / 2."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """How much a token of distance adds to each head's logits, negated (Press et al. 2021, arXiv 2108.12409)."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / whole) for h in range(whole)]
    between = [2.0 ** (-4 * (h + 1) / whole) for h in range(0, 2 * whole, 2)]
    return tuple((slopes + between)[:heads])
