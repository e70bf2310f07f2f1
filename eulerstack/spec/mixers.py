"""The sequence mixers a template may name, discriminated by `type` (and Mamba's by `variant`)."""

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, SerializeAsAny, Tag, WrapValidator

from .base import Block
from .extensions import ExtensionMixer, ExtensionSpec, or_extension

Positive = Annotated[int, Field(ge=1, le=1 << 24)]


class SinksSpec(Block):
    """Logits in the softmax that take weight and give nothing."""

    n_per_head: Annotated[int, Field(ge=1, le=1024)] = 1
    """Logits a head."""
    learnable: bool = True
    """Learned, or zero."""


class AttentionSpec(Block):
    """Softmax attention with the model's n_heads and n_kv_heads; latent_dim makes it multi-head latent attention."""

    qkv_bias: bool = False
    """Biases in the projections of queries, keys and values."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, head by head."""
    window: Positive | None = None
    """How many tokens a query sees, itself among them; all by default."""
    window_mode: Literal["standard", "sliding"] = "standard"
    """sliding asserts that there is a window."""
    logit_softcap: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """c in c * tanh(logits / c), before the softmax."""
    attention_sinks: SinksSpec | None = None
    """Logits in the softmax that take weight and give nothing."""
    attn_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of attention weights that training drops."""
    latent_dim: Positive | None = None
    """Width of the latent that the cache of multi-head latent attention holds."""
    rope_head_dim: Positive | None = None
    """Channels of the latent cache's rotated key; half a head by default."""

    def rotated_width(self, head_dim: int, rotary: bool) -> int:
        """Channels of the latent cache's shared key."""
        if not rotary:
            return 0
        return self.rope_head_dim or max(2, head_dim // 4 * 2)


class Mamba2Spec(Block):
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060)."""

    variant: Literal["mamba2"] = "mamba2"
    """mamba2, or mamba1."""
    d_state: Annotated[int, Field(ge=1, le=1024)] = 128
    """Numbers of state a channel."""
    d_conv: Annotated[int, Field(ge=2, le=64)] = 4
    """Tokens that the short convolution sees."""
    expand: Annotated[int, Field(ge=1, le=16)] = 2
    """Inner width over d_model."""
    head_dim: Annotated[int, Field(ge=1, le=4096)] = 64
    """Inner channels of a head."""
    n_groups: Annotated[int, Field(ge=1, le=4096)] = 1
    """Groups of heads that share B and C."""
    norm_before_gate: bool = False
    """Norm, then gate; the other way round by default."""
    chunk_size: Positive = 64
    """Tokens of a chunk."""

    def inner_width(self, d_model: int) -> int:
        return self.expand * d_model


class Mamba1Spec(Block):
    """Mamba-1: a selective scan (Gu and Dao 2023, arXiv 2312.00752)."""

    variant: Literal["mamba1"]
    """mamba1."""
    d_state: Annotated[int, Field(ge=1, le=1024)] = 16
    """Numbers of state a channel."""
    d_conv: Annotated[int, Field(ge=2, le=64)] = 4
    """Tokens that the short convolution sees."""
    expand: Annotated[int, Field(ge=1, le=16)] = 2
    """Inner width over d_model."""
    dt_rank: Positive | None = None
    """Rank of the step's projection; d_model / 16, rounded up, by default."""
    chunk_size: Positive = 64
    """The backward keeps one state for as many tokens."""

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
    """Multi-scale retention (Sun et al. 2023, arXiv 2307.08621); the defaults are the paper's layer."""

    chunkwise: bool = True
    """Train in the chunkwise form; false: in the parallel one."""
    chunk_size: Positive = 64
    """Tokens of a chunk."""
    rope: bool = True
    """Turn queries and keys."""
    gamma: Gamma = "eq8"
    """Decay: the paper's eq8 or paper_runs, learned (from eq8), gated by the input, or one number."""
    value_expand: Annotated[float, Field(gt=0, le=16)] = 2.0
    """Width of the values over d_model."""
    group_norm: bool = True
    """Norm each head's output."""
    swish_gate: bool = True
    """Gate the output by the input."""

    def value_width(self, d_model: int) -> int:
        return round(self.value_expand * d_model)


class LinearAttentionSpec(Block):
    """Normalised linear attention, feature map elu + 1, over the model's n_heads (arXiv 2006.16236)."""

    chunk_size: Positive = 64
    """Tokens of a chunk."""


class RWKVSpec(Block):
    """RWKV-4's time mixing (Peng et al. 2023, arXiv 2305.13048)."""

    chunk_size: Positive = 16
    """Tokens of a chunk."""


class HyenaSpec(Block):
    """Long convolutions, gated, with filters made by a small sine network (Poli et al. 2023, arXiv 2302.10866)."""

    depth: Annotated[int, Field(ge=1, le=8)] = 2
    """Long convolutions, with a gate before each."""
    filter_hidden: Annotated[int, Field(ge=1, le=4096)] = 64
    """Width of the network that makes the filters."""
    filter_decay: Annotated[float, Field(gt=0, le=1000)] = 1.5
    """The slowest filter falls to 1/100 over this many times max_seq_len, the fastest in a fifth of it."""
    d_conv: Annotated[int, Field(ge=2, le=64)] = 3
    """Tokens that the short convolution sees."""


class AttentionMixer(Block):
    """Attention."""

    type: Literal["attention"]
    attention: AttentionSpec = AttentionSpec()

    @property
    def spec(self) -> AttentionSpec:
        return self.attention


class MambaMixer(Block):
    """Mamba-2, or Mamba-1."""

    type: Literal["mamba"]
    mamba: MambaSpec = Mamba2Spec()
    """Of Mamba-2, unless its variant is mamba1."""

    @property
    def spec(self) -> Mamba1Spec | Mamba2Spec:
        return self.mamba


class RetNetMixer(Block):
    """Retention."""

    type: Literal["retnet"]
    retnet: RetNetSpec = RetNetSpec()

    @property
    def spec(self) -> RetNetSpec:
        return self.retnet


class LinearAttentionMixer(Block):
    """Linear attention."""

    type: Literal["linear_attention"]
    linear_attention: LinearAttentionSpec = LinearAttentionSpec()

    @property
    def spec(self) -> LinearAttentionSpec:
        return self.linear_attention


class RWKVMixer(Block):
    """RWKV-4."""

    type: Literal["rwkv"]
    rwkv: RWKVSpec = RWKVSpec()

    @property
    def spec(self) -> RWKVSpec:
        return self.rwkv


class HyenaMixer(Block):
    """Hyena."""

    type: Literal["hyena"]
    hyena: HyenaSpec = HyenaSpec()

    @property
    def spec(self) -> HyenaSpec:
        return self.hyena


class SelectorSpec(Block):
    """How branches become one output."""

    type: Literal["sum", "learned_gate"] = "sum"
    """sum adds the branches; learned_gate weighs them, token by token, with a softmax."""


Plain = AttentionMixer | MambaMixer | RetNetMixer | LinearAttentionMixer | RWKVMixer | HyenaMixer
Branch = SerializeAsAny[Annotated[Plain, Field(discriminator="type"), WrapValidator(or_extension)]]


class BranchedSpec(Block):
    """Mixers side by side, as in Hymba (arXiv 2411.13676) and Falcon-H1 (arXiv 2507.22448)."""

    branches: Annotated[dict[str, Branch], Field(min_length=2, max_length=16)]
    """The mixers, by names of your own."""
    selector: SelectorSpec = SelectorSpec()
    """How they become one output."""


class BranchedMixer(Block):
    """Mixers side by side."""

    type: Literal["branched"]
    branched: BranchedSpec

    @property
    def spec(self) -> BranchedSpec:
        return self.branched


MixerSpec = (
    AttentionSpec
    | Mamba1Spec
    | Mamba2Spec
    | RetNetSpec
    | LinearAttentionSpec
    | RWKVSpec
    | HyenaSpec
    | BranchedSpec
    | ExtensionSpec
)
AnyMixer = SerializeAsAny[Annotated[Plain | BranchedMixer, Field(discriminator="type"), WrapValidator(or_extension)]]


def side_by_side(mixer: Plain | BranchedMixer | ExtensionMixer) -> dict[str, Plain | ExtensionMixer]:
    """The mixers of a template by the keys below its `mixer`; one alone has none."""
    if not isinstance(mixer, BranchedMixer):
        return {"": mixer}
    return {f".branched.branches.{name}": branch for name, branch in mixer.branched.branches.items()}
