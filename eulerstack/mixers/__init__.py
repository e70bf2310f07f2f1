"""The sequence mixers, and which spec names which: a new mixer is one file, one spec class and one line here."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from ..kernels.provider import Target
from ..layers.serve import serve
from ..spec import (
    AttentionSpec,
    BranchedSpec,
    ExtensionSpec,
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
from .base import Mixer, check_one_token, continued, in_chunks, placed
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
    make = extension(type(spec)) if isinstance(spec, ExtensionSpec) else MIXERS[type(spec)]
    mixer = make(spec, stack, target)
    mixer.choices += serve(mixer, target)
    return mixer


def extension(spec: type[ExtensionSpec]) -> type[Mixer[Any]]:
    """The mixer that another package's spec names. Raises ValueError where there is none."""
    found = spec.MIXER
    if isinstance(found, str):
        try:
            found = resolve_name(found)
        except Exception as error:  # whatever another package's code may raise
            raise ValueError(
                f"{spec.__module__}.{spec.__name__}.MIXER = {found!r} does not load: {type(error).__name__}: {error}"
            ) from error
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise ValueError(f"{spec.__name__}.MIXER is {found!r}; name a subclass of eulerstack.mixers.Mixer")
    return found


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
    "check_one_token",
    "continued",
    "extension",
    "in_chunks",
    "make_mixer",
    "placed",
]
