"""Causal softmax attention. q: [B, T, H, K]; k: [B, S, Hkv, K]; v: [B, S, Hkv, V]; H / Hkv query heads share a kv head.

`whole` attends among the tokens of a call, `cached` to any keys under a mask, `continued` to all of a past and among
the tokens of a call, where that takes no mask.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..provider import Kernel


class Attending(NamedTuple):
    """The three functions of a provider."""

    whole: Kernel
    cached: Kernel
    continued: Kernel


@dataclass(frozen=True, eq=False)
class Logits:
    """How logits are made of q k^T: times scale, capped to (-softcap, softcap), less slopes [H] times the distance.

    sinks: [H, n] more logits in every softmax, whose values are zero.
    """

    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether they are scaled, and no more."""
        return self.softcap is None and self.slopes is None and self.sinks is None
