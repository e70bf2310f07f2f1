"""The channel mixers a template may name, discriminated by `type`."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Block

Ratio = Annotated[float, Field(gt=0, le=64)]


class MLPSpec(Block):
    """down(act(up x))."""

    type: Literal["mlp"]
    activation: Literal["gelu", "relu", "relu2", "silu"] = "gelu"
    """Between the two projections."""
    bias: bool = False
    """Biases in the projections."""
    mlp_ratio: Ratio | None = None
    """Width over d_model; the model's by default."""


class GatedMLPSpec(Block):
    """down(act(gate x) * up x)."""

    type: Literal["gated_mlp"]
    activation: Literal["swiglu", "geglu", "reglu"] = "swiglu"
    """Of the gate: silu, gelu or relu."""
    bias: bool = False
    """Biases in the projections."""
    mlp_ratio: Ratio | None = None
    """Width over d_model; the model's by default."""


class BiasCorrectionSpec(Block):
    """Balance without a loss: a bias a router output, moved after each optimizer step (arXiv 2408.15664)."""

    enabled: bool = True
    """false does without."""
    update_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """How far a bias moves after each optimizer step."""


class MoESpec(Block):
    """A router picks experts for each token; none is dropped."""

    experts: Annotated[int, Field(ge=1, le=4096)] = 8
    """How many experts there are to choose from."""
    top_k: Annotated[int, Field(ge=1, le=4096)] = 2
    """How many of them serve a token."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """softmax weighs the chosen experts by a softmax over their logits, sigmoid by sigmoids that sum to one."""
    shared_experts: Annotated[int, Field(ge=0, le=64)] = 0
    """Experts that serve every token."""
    load_balance_coef: Annotated[float, Field(ge=0, le=100)] | None = None
    """Weight of the load-balancing loss; training_hints.router_aux_loss_coef by default."""
    z_loss: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of the loss on the router's logits."""
    bias_correction: BiasCorrectionSpec | None = None
    """Balance without a loss."""

    @property
    def bias_rate(self) -> float | None:
        """Step of the balancing bias; None without one."""
        correction = self.bias_correction
        return correction.update_rate if correction is not None and correction.enabled else None


class MoEFFNSpec(Block):
    """A mixture of gated experts."""

    type: Literal["moe"]
    activation: Literal["swiglu", "geglu", "reglu"] = "swiglu"
    """Of the experts' gates."""
    mlp_ratio: Ratio | None = None
    """Width of one expert over d_model; the model's by default."""
    moe: MoESpec = MoESpec()
    """The experts and their router."""


class NoFFN(Block):
    """The layer is its mixer alone."""

    type: Literal["none"]


FFNSpec = Annotated[MLPSpec | GatedMLPSpec | MoEFFNSpec | NoFFN, Field(discriminator="type")]
