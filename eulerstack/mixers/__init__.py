"""The sequence mixers, and which spec names which: a new mixer is one file, one spec class and one line here."""

from collections.abc import Callable
from typing import Any

from ..kernels.provider import Target
from ..spec import (
    AttentionSpec,
    BranchedSpec,
    HyenaSpec,
    LinearAttentionSpec,
    Mamba1Spec,
    Mamba2Spec,
    MixerSpec,
    RetNetSpec,
    RWKVSpec,
    StackSpec,
)
from .attention import Attention
from .base import Mixer, in_chunks
from .branched import Branched
from .hyena import Hyena
from .latent import LatentAttention
from .linear import LinearAttention
from .mamba1 import Mamba1
from .mamba2 import Mamba2
from .retention import Retention
from .rwkv import RWKV


def _attention(spec: AttentionSpec, stack: StackSpec, target: Target) -> Mixer[Any]:
    return Attention(spec, stack, target) if spec.latent_dim is None else LatentAttention(spec, stack, target)


def _branched(spec: BranchedSpec, stack: StackSpec, target: Target) -> Mixer[Any]:
    branches = [make_mixer(branch.spec, stack, target) for branch in spec.branches.values()]
    return Branched(branches, stack.model.d_model, spec.selector.type == "learned_gate")


MIXERS: dict[type[MixerSpec], Callable[..., Mixer[Any]]] = {
    AttentionSpec: _attention,
    BranchedSpec: _branched,
    HyenaSpec: Hyena,
    LinearAttentionSpec: LinearAttention,
    Mamba1Spec: Mamba1,
    Mamba2Spec: Mamba2,
    RetNetSpec: Retention,
    RWKVSpec: RWKV,
}


def make_mixer(spec: MixerSpec, stack: StackSpec, target: Target = Target()) -> Mixer[Any]:
    """The mixer a spec names, for the widths of its stack."""
    return MIXERS[type(spec)](spec, stack, target)


__all__ = [
    "MIXERS",
    "RWKV",
    "Attention",
    "Branched",
    "Hyena",
    "LatentAttention",
    "LinearAttention",
    "Mamba1",
    "Mamba2",
    "Mixer",
    "Retention",
    "in_chunks",
    "make_mixer",
]
