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


class BiasCorrectionSpec(Block):
    """Balance without a loss: a bias a router output, moved by update_rate after each optimizer step."""

    enabled: bool = True
    update_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3


class MoESpec(Block):
    """A router picks top_k of `experts`; shared_experts serve every token.

    `softmax` weighs the chosen experts by a softmax over their logits, `sigmoid` by sigmoids that sum to one. Tokens
    are never dropped.
    """

    experts: Annotated[int, Field(ge=1, le=4096)] = 8
    top_k: Annotated[int, Field(ge=1, le=4096)] = 2
    router: Literal["softmax", "sigmoid"] = "softmax"
    shared_experts: Annotated[int, Field(ge=0, le=64)] = 0
    load_balance_coef: Annotated[float, Field(ge=0, le=100)] = 0.01
    z_loss: Annotated[float, Field(ge=0, le=100)] = 0.0
    bias_correction: BiasCorrectionSpec | None = None

    @property
    def bias_rate(self) -> float | None:
        """Step of the balancing bias; None without one."""
        correction = self.bias_correction
        return correction.update_rate if correction is not None and correction.enabled else None


class MoEFFNSpec(Block):
    """A mixture of gated experts, each mlp_ratio * d_model wide."""

    type: Literal["moe"]
    activation: Literal["swiglu", "geglu", "reglu"] = "swiglu"
    mlp_ratio: Ratio | None = None
    moe: MoESpec = MoESpec()


class NoFFN(Block):
    """The layer is its mixer alone."""

    type: Literal["none"]


FFNSpec = Annotated[MLPSpec | GatedMLPSpec | MoEFFNSpec | NoFFN, Field(discriminator="type")]
