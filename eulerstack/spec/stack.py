"""StackSpec: a whole stack file. Start reading here."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .base import Block
from .check import cross_check, refuse
from .layer import LayerTemplate
from .mixers import Positive
from .schedule import Entry

Width = Annotated[int, Field(ge=1, le=1 << 17)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelSpec(Block):
    """Widths shared by all layers. family_hint and target_params are metadata, shown by `explain`."""

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]
    d_model: Width
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    max_seq_len: Positive
    n_heads: Width
    n_kv_heads: Width | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    family_hint: str | None = None
    target_params: Annotated[int, Field(ge=1)] | None = None

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads


class ByteTokenizer(Block):
    """The 256 bytes of UTF-8: nothing to download."""

    type: Literal["byte"]


class HFTokenizer(Block):
    """A tokenizer.json of Hugging Face `tokenizers`: the file, or the folder that holds it."""

    type: Literal["hf"]
    pretrained: Annotated[str, Field(min_length=1)]
    add_bos: bool = False
    add_eos: bool = False


class RopeScalingSpec(Block):
    """Rotary positions for contexts `factor` times as long as original_max_seq_len (max_seq_len / factor by default).

    `linear` divides positions, `ntk` raises theta, `yarn` divides slow channels, keeps fast ones and scales logits.
    """

    type: Literal["linear", "ntk", "yarn"]
    factor: Annotated[float, Field(ge=1, le=1e6)]
    original_max_seq_len: Positive | None = None


class EmbeddingSpec(Block):
    """Learned token embeddings, multiplied by `scale`. `positional` is attention's; a retnet turns by its own `rope`.

    Both use rope_theta and rope_scaling.
    """

    type: Literal["learned"] = "learned"
    positional: Literal["rope", "none", "alibi"] = "rope"
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] = 10000.0
    rope_scaling: RopeScalingSpec | None = None
    tie_word_embeddings: bool = True
    scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0


class MultiTokenSpec(Block):
    """n_predict modules of head_layers layers of head_template, each trained to predict one token further ahead.

    Their mean loss counts train_loss_weight times (DeepSeek-V3, arXiv 2412.19437, section 2.2); inference has no use
    for them.
    """

    n_predict: Annotated[int, Field(ge=1, le=16)] = 1
    head_layers: Annotated[int, Field(ge=1, le=64)] = 1
    head_template: str
    train_loss_weight: Annotated[float, Field(gt=0, le=100)] = 0.3


class HeadSpec(Block):
    """The next-token head, which causal_lm_mtp trains with others for the tokens after that.

    tie_weights follows embedding.tie_word_embeddings unless set; logit_softcap c makes logits c tanh(logits / c).
    """

    type: Literal["causal_lm", "causal_lm_mtp"] = "causal_lm"
    tie_weights: bool | None = None
    logit_softcap: Annotated[float, Field(gt=0, le=1e6)] | None = None
    mtp: MultiTokenSpec | None = None


class TrainingHints(Block):
    """Defaults of `fit`; the command line overrides each."""

    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    lr_peak: Annotated[float, Field(gt=0, le=10)] = 3e-3
    lr_floor_ratio: Fraction = 0.1
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    warmup_steps_ratio: Fraction = 0.05


class StackSpec(Block):
    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    model: ModelSpec
    tokenizer_contract: Annotated[ByteTokenizer | HFTokenizer, Field(discriminator="type")]
    embedding: EmbeddingSpec
    layer_templates: Annotated[dict[str, LayerTemplate], Field(min_length=1)]
    layer_schedule: Annotated[tuple[Entry, ...], Field(min_length=1, strict=False)]
    head: HeadSpec
    training_hints: TrainingHints = TrainingHints()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        refuse(cross_check(self))
        return self

    @property
    def tied(self) -> bool:
        """Whether the head reads the embedding's weights."""
        return self.embedding.tie_word_embeddings
