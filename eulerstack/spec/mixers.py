"""The sequence mixers a template may name, discriminated by `type`."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Block

Positive = Annotated[int, Field(ge=1, le=1 << 24)]


class AttentionSpec(Block):
    """Softmax attention with the model's n_heads and n_kv_heads."""

    qkv_bias: bool = False
    window: Positive | None = None


class MambaSpec(Block):
    """Mamba-2: d_inner = expand * d_model, in heads of head_dim channels that share n_groups of B and C."""

    variant: Literal["mamba2"] = "mamba2"
    d_state: Annotated[int, Field(ge=1, le=1024)] = 128
    d_conv: Annotated[int, Field(ge=2, le=64)] = 4
    expand: Annotated[int, Field(ge=1, le=16)] = 2
    head_dim: Annotated[int, Field(ge=1, le=4096)] = 64
    n_groups: Annotated[int, Field(ge=1, le=4096)] = 1
    chunk_size: Positive = 64

    def inner_width(self, d_model: int) -> int:
        return self.expand * d_model


class RetNetSpec(Block):
    """Multi-scale retention; the defaults are the paper's layer."""

    chunkwise: bool = True
    chunk_size: Positive = 64
    rope: bool = True
    gamma: Literal["eq8", "paper_runs"] = "eq8"
    value_expand: Annotated[float, Field(gt=0, le=16)] = 2.0
    group_norm: bool = True
    swish_gate: bool = True

    def value_width(self, d_model: int) -> int:
        return round(self.value_expand * d_model)


class AttentionMixer(Block):
    type: Literal["attention"]
    attention: AttentionSpec = AttentionSpec()

    @property
    def spec(self) -> AttentionSpec:
        return self.attention


class MambaMixer(Block):
    type: Literal["mamba"]
    mamba: MambaSpec = MambaSpec()

    @property
    def spec(self) -> MambaSpec:
        return self.mamba


class RetNetMixer(Block):
    type: Literal["retnet"]
    retnet: RetNetSpec = RetNetSpec()

    @property
    def spec(self) -> RetNetSpec:
        return self.retnet


MixerSpec = AttentionSpec | MambaSpec | RetNetSpec
AnyMixer = Annotated[AttentionMixer | MambaMixer | RetNetMixer, Field(discriminator="type")]
