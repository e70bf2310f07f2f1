"""The sequence mixers a template may name, discriminated by `type` (and Mamba's by `variant`)."""

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .base import Block

Positive = Annotated[int, Field(ge=1, le=1 << 24)]


class SinksSpec(Block):
    """Sinks in the softmax: n_per_head logits a head that take weight and give nothing, learned or zero."""

    n_per_head: Annotated[int, Field(ge=1, le=1024)] = 1
    learnable: bool = True


class AttentionSpec(Block):
    """Softmax attention with the model's n_heads and n_kv_heads.

    latent_dim makes it multi-head latent attention, whose cache holds a latent of that width and a rotated key of
    rope_head_dim channels (half a head by default) that all heads share. window_mode: sliding asserts a window.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    window: Positive | None = None
    window_mode: Literal["standard", "sliding"] = "standard"
    logit_softcap: Annotated[float, Field(gt=0, le=1e6)] | None = None
    attention_sinks: SinksSpec | None = None
    latent_dim: Positive | None = None
    rope_head_dim: Positive | None = None

    def rotated_width(self, head_dim: int, rotary: bool) -> int:
        """Channels of the latent cache's shared key."""
        if not rotary:
            return 0
        return self.rope_head_dim or max(2, head_dim // 4 * 2)


class Mamba2Spec(Block):
    """Mamba-2: d_inner = expand * d_model, in heads of head_dim channels that share n_groups of B and C."""

    variant: Literal["mamba2"] = "mamba2"
    d_state: Annotated[int, Field(ge=1, le=1024)] = 128
    d_conv: Annotated[int, Field(ge=2, le=64)] = 4
    expand: Annotated[int, Field(ge=1, le=16)] = 2
    head_dim: Annotated[int, Field(ge=1, le=4096)] = 64
    n_groups: Annotated[int, Field(ge=1, le=4096)] = 1
    norm_before_gate: bool = False
    chunk_size: Positive = 64

    def inner_width(self, d_model: int) -> int:
        return self.expand * d_model


class Mamba1Spec(Block):
    """Mamba-1: a selective scan over d_inner = expand * d_model channels of d_state numbers each.

    dt_rank is d_model / 16 rounded up by default; the backward keeps a state every chunk_size tokens.
    """

    variant: Literal["mamba1"]
    d_state: Annotated[int, Field(ge=1, le=1024)] = 16
    d_conv: Annotated[int, Field(ge=2, le=64)] = 4
    expand: Annotated[int, Field(ge=1, le=16)] = 2
    dt_rank: Positive | None = None
    chunk_size: Positive = 64

    def inner_width(self, d_model: int) -> int:
        return self.expand * d_model

    def rank(self, d_model: int) -> int:
        return self.dt_rank or math.ceil(d_model / 16)


def _variant(value: Any) -> Any:
    """Which Mamba a sub-object means: the second, unless it says otherwise."""
    return value.get("variant", "mamba2") if isinstance(value, dict) else getattr(value, "variant", "mamba2")


MambaSpec = Annotated[
    Annotated[Mamba1Spec, Tag("mamba1")] | Annotated[Mamba2Spec, Tag("mamba2")], Discriminator(_variant)
]


Gamma = Annotated[
    Annotated[Literal["eq8", "paper_runs", "learned", "gated"], Tag("word")]
    | Annotated[float, Field(gt=0, le=1), Tag("number")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "number"),
]


class RetNetSpec(Block):
    """Multi-scale retention; the defaults are the paper's layer.

    gamma, the decay a head: `eq8` and `paper_runs` are the paper's schedules, `learned` starts from eq8, `gated`
    depends on the input (YOCO's gated retention), and a number is the same in all heads.
    """

    chunkwise: bool = True
    chunk_size: Positive = 64
    rope: bool = True
    gamma: Gamma = "eq8"
    value_expand: Annotated[float, Field(gt=0, le=16)] = 2.0
    group_norm: bool = True
    swish_gate: bool = True

    def value_width(self, d_model: int) -> int:
        return round(self.value_expand * d_model)


class LinearAttentionSpec(Block):
    """Normalised linear attention with the feature map elu + 1, over the model's n_heads."""

    chunk_size: Positive = 64


class RWKVSpec(Block):
    """RWKV-4's time mixing."""

    chunk_size: Positive = 16


class HyenaSpec(Block):
    """Hyena: `depth` long convolutions with gates between them, their filters made by a small sine network.

    The slowest channel's filter falls to 1/100 over filter_decay * max_seq_len tokens, the fastest's in a fifth of it.
    """

    depth: Annotated[int, Field(ge=1, le=8)] = 2
    filter_hidden: Annotated[int, Field(ge=1, le=4096)] = 64
    filter_decay: Annotated[float, Field(gt=0, le=1000)] = 1.5
    d_conv: Annotated[int, Field(ge=2, le=64)] = 3


class AttentionMixer(Block):
    type: Literal["attention"]
    attention: AttentionSpec = AttentionSpec()

    @property
    def spec(self) -> AttentionSpec:
        return self.attention


class MambaMixer(Block):
    type: Literal["mamba"]
    mamba: MambaSpec = Mamba2Spec()

    @property
    def spec(self) -> Mamba1Spec | Mamba2Spec:
        return self.mamba


class RetNetMixer(Block):
    type: Literal["retnet"]
    retnet: RetNetSpec = RetNetSpec()

    @property
    def spec(self) -> RetNetSpec:
        return self.retnet


class LinearAttentionMixer(Block):
    type: Literal["linear_attention"]
    linear_attention: LinearAttentionSpec = LinearAttentionSpec()

    @property
    def spec(self) -> LinearAttentionSpec:
        return self.linear_attention


class RWKVMixer(Block):
    type: Literal["rwkv"]
    rwkv: RWKVSpec = RWKVSpec()

    @property
    def spec(self) -> RWKVSpec:
        return self.rwkv


class HyenaMixer(Block):
    type: Literal["hyena"]
    hyena: HyenaSpec = HyenaSpec()

    @property
    def spec(self) -> HyenaSpec:
        return self.hyena


class SelectorSpec(Block):
    """How branches become one output: their sum, or weights that a softmax gives each token."""

    type: Literal["sum", "learned_gate"] = "sum"


Plain = AttentionMixer | MambaMixer | RetNetMixer | LinearAttentionMixer | RWKVMixer | HyenaMixer


class BranchedSpec(Block):
    """Two or more mixers side by side, by names of one's own."""

    branches: Annotated[dict[str, Annotated[Plain, Field(discriminator="type")]], Field(min_length=2, max_length=16)]
    selector: SelectorSpec = SelectorSpec()


class BranchedMixer(Block):
    type: Literal["branched"]
    branched: BranchedSpec

    @property
    def spec(self) -> BranchedSpec:
        return self.branched


MixerSpec = (
    AttentionSpec | Mamba1Spec | Mamba2Spec | RetNetSpec | LinearAttentionSpec | RWKVSpec | HyenaSpec | BranchedSpec
)
AnyMixer = Annotated[Plain | BranchedMixer, Field(discriminator="type")]


def side_by_side(mixer: Plain | BranchedMixer) -> dict[str, Plain]:
    """The mixers of a template by the keys below its `mixer`; one alone has none."""
    if not isinstance(mixer, BranchedMixer):
        return {"": mixer}
    return {f".branched.branches.{name}": branch for name, branch in mixer.branched.branches.items()}
