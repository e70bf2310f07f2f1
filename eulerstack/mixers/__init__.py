"""The sequence mixers, and which spec names which: a new mixer is one file, one spec class and one line here."""

from ..spec import AttentionSpec, MambaSpec, MixerSpec, RetNetSpec, StackSpec
from .attention import Attention
from .base import Mixer
from .mamba2 import Mamba2
from .retention import Retention

MIXERS = {AttentionSpec: Attention, MambaSpec: Mamba2, RetNetSpec: Retention}


def make_mixer(spec: MixerSpec, stack: StackSpec, kernels: str = "auto") -> Mixer:  # type: ignore[type-arg]
    """The mixer a spec names, for the widths of its stack."""
    return MIXERS[type(spec)](spec, stack, kernels)  # type: ignore[arg-type]


__all__ = ["MIXERS", "Attention", "Mamba2", "Mixer", "Retention", "make_mixer"]
