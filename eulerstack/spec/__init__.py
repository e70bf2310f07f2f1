"""The YAML language: what a stack file may say. Imports no torch, and nothing else of ours."""

from .check import idle_hints
from .differ import differ
from .errors import Problem, SpecError, SpecWarning
from .expand import LayerSpec, ahead, expand
from .extensions import ExtensionSpec, register
from .ffn import FFNSpec, GatedMLPSpec, MLPSpec, MoEFFNSpec, NoFFN
from .json_schema import schema
from .layer import KeepSpec, LayerTemplate, NormSpec, ResidualSpec
from .load import dump, from_data, hint_places, load, loads, presets, spec_of, with_hints
from .mixers import (
    AttentionSpec,
    BranchedSpec,
    HyenaSpec,
    LinearAttentionSpec,
    Mamba1Spec,
    Mamba2Spec,
    MixerSpec,
    RetNetSpec,
    RWKVSpec,
)
from .schedule import OverrideSpec, PatternEntry, ScheduleEntry
from .stack import (
    ByteTokenizer,
    EmbeddingSpec,
    HeadSpec,
    HFTokenizer,
    ModelSpec,
    MuPSpec,
    RopeScalingSpec,
    StackSpec,
)
from .training import Checkpointing, GroupSpec, MuonSpec, TrainingHints

__all__ = [
    "AttentionSpec",
    "BranchedSpec",
    "ByteTokenizer",
    "Checkpointing",
    "EmbeddingSpec",
    "ExtensionSpec",
    "FFNSpec",
    "GatedMLPSpec",
    "GroupSpec",
    "HFTokenizer",
    "HeadSpec",
    "HyenaSpec",
    "KeepSpec",
    "LayerSpec",
    "LayerTemplate",
    "LinearAttentionSpec",
    "MLPSpec",
    "Mamba1Spec",
    "Mamba2Spec",
    "MixerSpec",
    "MoEFFNSpec",
    "ModelSpec",
    "MuPSpec",
    "MuonSpec",
    "NoFFN",
    "NormSpec",
    "OverrideSpec",
    "PatternEntry",
    "Problem",
    "RWKVSpec",
    "ResidualSpec",
    "RetNetSpec",
    "RopeScalingSpec",
    "ScheduleEntry",
    "SpecError",
    "SpecWarning",
    "StackSpec",
    "TrainingHints",
    "ahead",
    "differ",
    "dump",
    "expand",
    "from_data",
    "hint_places",
    "idle_hints",
    "load",
    "loads",
    "presets",
    "register",
    "schema",
    "spec_of",
    "with_hints",
]
