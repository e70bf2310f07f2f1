"""How a stack is trained: the defaults of `fit`."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Block

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0, le=10)]
Multiplier = Annotated[float, Field(ge=0, le=1000)]
Checkpointing = Literal["none", "selective", "block"]


class MuonSpec(Block):
    """Muon's settings (Jordan et al. 2024): steps along the momentum, made orthogonal."""

    lr: Annotated[float, Field(gt=0, le=10)] = 0.02
    """Its learning rate, times sqrt(rows / columns) where a matrix has more rows."""
    momentum: Beta = 0.95
    """Share of the momentum that is kept."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Iterations of Newton and Schulz."""
    weight_decay: Decay = 0.01
    """Of the weights that Muon trains."""


class GroupSpec(Block):
    """Parameters that train otherwise than the rest; the first group that matches wins."""

    match: Annotated[str, Field(min_length=1, max_length=1000)]
    """A glob over parameters' names, as in `layers.*.mixer.*`."""
    lr_multiplier: Multiplier = 1.0
    """On their learning rate."""
    weight_decay: Decay | None = None
    """Of those among them that decay at all: norms, biases and decays never do."""


class TrainingHints(Block):
    """Defaults of `fit`; the command line overrides each."""

    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Of the weights and the shuffling."""
    init: Literal["mixer", "normal"] = "mixer"
    """mixer draws weights as each mixer's paper does, normal draws linear weights from N(0, 0.02)."""
    dropout: Beta = 0.0
    """Share of what each sublayer adds to the residual stream that training drops."""
    checkpointing: Checkpointing = "none"
    """What layers compute again in the backward instead of keeping it: block all, selective all but products by weights
    and attention."""
    router_aux_loss_coef: Annotated[float, Field(ge=0, le=100)] = 0.01
    """Weight of the load-balancing loss of experts without a load_balance_coef of their own."""
    optimizer: Literal["adamw", "hybrid", "muon"] = "adamw"
    """hybrid gives the hidden layers' matrices to Muon, muon every matrix; AdamW keeps the rest."""
    lr_peak: Annotated[float, Field(gt=0, le=10)] = 3e-3
    """AdamW's learning rate after warm-up."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: Decay = 0.1
    """AdamW's, on matrices and embeddings only."""
    muon: MuonSpec = MuonSpec()
    """Muon's settings."""
    router_lr_multiplier: Multiplier = 1.0
    """On the learning rate of routers."""
    optimizer_groups: Annotated[tuple[GroupSpec, ...], Field(strict=False, max_length=1000)] = ()
    """Parameters that train otherwise, by name."""
    z_loss: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of the mean square of log Z, the softmax's divisor, which keeps logits from drifting."""
    grad_clip: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    """Largest gradient norm; null clips nothing."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How all learning rates fall after warm-up; wsd only at the end."""
    warmup_steps_ratio: Fraction = 0.05
    """Share of the steps that warm up."""
    lr_floor_ratio: Fraction = 0.1
    """The last learning rate, as a share of its peak."""
    decay_steps_ratio: Fraction = 0.2
    """Share of the steps in which wsd falls."""
