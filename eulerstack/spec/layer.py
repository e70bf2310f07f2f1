"""A layer template: a mixer, a channel mixer, and how they are normed and added."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Block
from .ffn import FFNSpec
from .mixers import AnyMixer


class NormSpec(Block):
    """How and where a layer's sublayers are normed."""

    type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """rmsnorm divides by the root mean square, layernorm also subtracts the mean."""
    position: Literal["pre", "post", "sandwich"] = "pre"
    """pre norms the input of a sublayer, post the sum after it, sandwich its input and its output."""


class ResidualSpec(Block):
    """How sublayers join the residual stream."""

    type: Literal["sequential", "parallel"] = "sequential"
    """sequential adds the mixer, then the FFN; parallel adds both, from one norm."""
    scaling: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """What is added is multiplied with this."""


class KeepSpec(Block):
    """What the template keeps at inference (the YAML's `state`).

    true asserts it, false makes the incremental forms refuse, unset infers it from the mixer.
    """

    kv_cache: bool | None = None
    """Of mixers other than mamba and rwkv."""
    ssm_state: bool | None = None
    """Of mamba and rwkv."""

    @property
    def kept(self) -> bool:
        return self.kv_cache is not False and self.ssm_state is not False


class LayerTemplate(Block):
    """A kind of layer."""

    mixer: AnyMixer
    """Mixes tokens."""
    ffn: FFNSpec
    """Mixes channels."""
    norm: NormSpec = NormSpec()
    """Of both sublayers."""
    residual: ResidualSpec = ResidualSpec()
    """How the sublayers are added."""
    state: KeepSpec = KeepSpec()
    """What the layers keep at inference."""
