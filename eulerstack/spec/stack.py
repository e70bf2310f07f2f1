"""StackSpec: a whole stack file. Start reading here."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from .base import Block
from .check import cross_check, forget, refuse
from .extensions import ExtensionMixer
from .layer import LayerTemplate
from .mixers import Positive, side_by_side
from .schedule import Entry
from .training import TrainingHints

Width = Annotated[int, Field(ge=1, le=1 << 17)]


class MuPSpec(Block):
    """The same templates at another width: the base, whose learning rate is right for this width too.

    muP (Yang et al. 2022, arXiv 2203.03466): hidden weights learn at base / width of the rate, and logits are scaled.
    """

    d_model: Width
    """The width at which the learning rate was tuned."""
    n_heads: Width | None = None
    """Heads at that width; the model's by default, so that heads grow wider."""


class ModelSpec(Block):
    """Widths shared by all layers."""

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]
    """What the stack is called in messages and files."""
    d_model: Width
    """Width of the residual stream."""
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    """How many tokens there are."""
    max_seq_len: Positive
    """The longest sequence, in tokens, that layers which keep every token can hold."""
    n_heads: Width
    """Heads of attention, retention and the other mixers that have heads; divides d_model."""
    n_kv_heads: Width | None = None
    """Heads of keys and values in attention, shared by groups of query heads; n_heads by default."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Width of the FFNs over d_model, where they name none of their own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations; decays and recurrent states stay at least float32."""
    mup: MuPSpec | None = None
    """The base of muP, for a learning rate tuned at another width; null is the standard parametrisation."""
    family_hint: str | None = None
    """Metadata: what kind of model this is, shown by `explain`."""
    target_params: Annotated[int, Field(ge=1)] | None = None
    """Metadata: how many parameters were aimed at, shown by `explain`."""

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def base(self) -> Self:
        """The widths at which the learning rate was tuned: these, unless muP names others."""
        if self.mup is None:
            return self
        heads = self.mup.n_heads or self.n_heads
        kv_heads = self.n_kv_heads and self.n_kv_heads * heads // self.n_heads
        widths = {"d_model": self.mup.d_model, "n_heads": heads, "n_kv_heads": kv_heads}
        return self.model_copy(update={**widths, "mup": None})


class ByteTokenizer(Block):
    """The 256 bytes of UTF-8: nothing to download."""

    type: Literal["byte"]


class HFTokenizer(Block):
    """A tokenizer.json of Hugging Face `tokenizers`: the file, or the folder that holds it."""

    type: Literal["hf"]
    pretrained: Annotated[str, Field(min_length=1)]
    """A tokenizer.json, or the folder that holds one."""
    add_bos: bool = False
    """Begin every document with the tokenizer's first token."""
    add_eos: bool = False
    """End every document with the tokenizer's last token."""


class RopeScalingSpec(Block):
    """Rotary positions for contexts longer than the original."""

    type: Literal["linear", "ntk", "yarn"]
    """linear divides positions; ntk raises theta; yarn divides slow channels, keeps fast ones, scales logits."""
    factor: Annotated[float, Field(ge=1, le=1e6)]
    """How many times longer the context is than the original."""
    original_max_seq_len: Positive | None = None
    """The original context in tokens, for yarn; max_seq_len / factor by default."""


class EmbeddingSpec(Block):
    """Token embeddings; `positional` is attention's, a retnet turns by its own `rope`."""

    type: Literal["learned"] = "learned"
    """A vector learned for each token."""
    positional: Literal["rope", "none", "alibi"] = "rope"
    """How attention knows positions: turned pairs of channels, a bias by distance, or not at all."""
    rope_theta: Annotated[float, Field(gt=1, le=1e12)] = 10000.0
    """The base of the rotations' wavelengths, of attention and of retnets."""
    rope_scaling: RopeScalingSpec | None = None
    """Rotations for a longer context."""
    tie_word_embeddings: bool = True
    """The head reads the embedding's weights."""
    scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """What embeddings are multiplied with."""


class MultiTokenSpec(Block):
    """Modules trained to look further ahead (DeepSeek-V3, arXiv 2412.19437, section 2.2); inference does without."""

    n_predict: Annotated[int, Field(ge=1, le=16)] = 1
    """How many modules there are, each looking one token further ahead."""
    head_layers: Annotated[int, Field(ge=1, le=64)] = 1
    """Layers of each module."""
    head_template: str
    """The template of these layers."""
    train_loss_weight: Annotated[float, Field(gt=0, le=100)] = 0.3
    """What the modules' mean loss counts in the training loss."""


class HeadSpec(Block):
    """From the last layer to the loss."""

    type: Literal["causal_lm", "causal_lm_mtp"] = "causal_lm"
    """causal_lm predicts the next token; causal_lm_mtp is also trained on tokens further ahead."""
    tie_weights: bool | None = None
    """Says again what embedding.tie_word_embeddings says."""
    logit_softcap: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """c in c * tanh(logits / c)."""
    mtp: MultiTokenSpec | None = None
    """The modules of causal_lm_mtp."""


class StackSpec(Block):
    """A stack file of eulerstack."""

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    """Of the language: 1."""
    model: ModelSpec
    """Widths shared by all layers."""
    tokenizer_contract: Annotated[ByteTokenizer | HFTokenizer, Field(discriminator="type")]
    """The tokenizer that the stack is trained with."""
    embedding: EmbeddingSpec
    """Token embeddings and positions."""
    layer_templates: Annotated[dict[str, LayerTemplate], Field(min_length=1)]
    """Kinds of layers, by names of your own."""
    layer_schedule: Annotated[tuple[Entry, ...], Field(min_length=1, strict=False)]
    """Which templates follow each other."""
    head: HeadSpec
    """From the last layer to the loss."""
    training_hints: TrainingHints = TrainingHints()
    """Defaults of `fit`."""

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        forget(self, info.context or ())
        refuse(cross_check(self))
        return self

    @property
    def tied(self) -> bool:
        """Whether the head reads the embedding's weights."""
        return self.embedding.tie_word_embeddings

    @property
    def base(self) -> Self:
        """The stack at the widths at which the learning rate was tuned."""
        return self.model_copy(update={"model": self.model.base})

    @property
    def extensions(self) -> dict[str, str]:
        """The mixers of other packages by their names, and how to get each."""
        mixers = [m for template in self.layer_templates.values() for m in side_by_side(template.mixer).values()]
        return {mixer.type: mixer.origin for mixer in mixers if isinstance(mixer, ExtensionMixer)}
