"""The channel mixers a template may name, discriminated by `type`."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Block

Ratio = Annotated[float, Field(gt=0, le=64)]


class MLPSpec(Block):
    """down(act(up x)); mlp_ratio overrides the model's."""

    type: Literal["mlp"]
    activation: Literal["gelu", "relu", "relu2", "silu"] = "gelu"
    bias: bool = False
    mlp_ratio: Ratio | None = None


class GatedMLPSpec(Block):
    """down(act(gate x) * up x); mlp_ratio overrides the model's."""

    type: Literal["gated_mlp"]
    activation: Literal["swiglu", "geglu", "reglu"] = "swiglu"
    bias: bool = False
    mlp_ratio: Ratio | None = None


class NoFFN(Block):
    """The layer is its mixer alone."""

    type: Literal["none"]


FFNSpec = Annotated[MLPSpec | GatedMLPSpec | NoFFN, Field(discriminator="type")]
