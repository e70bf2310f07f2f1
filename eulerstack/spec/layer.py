"""A layer template: a mixer, a channel mixer, and how they are normed and added."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Block
from .ffn import FFNSpec
from .mixers import AnyMixer


class NormSpec(Block):
    """`pre` norms the input of a sublayer, `post` the sum after it, `sandwich` its input and its output."""

    type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    position: Literal["pre", "post", "sandwich"] = "pre"


class ResidualSpec(Block):
    """`sequential` adds mixer, then FFN; `parallel` adds both from one norm. scaling multiplies what is added."""

    type: Literal["sequential", "parallel"] = "sequential"
    scaling: Annotated[float, Field(gt=0, le=1000)] = 1.0


class KeepSpec(Block):
    """What the template keeps at inference (the YAML's `state`): true asserts it, false makes the incremental forms
    refuse, unset infers it from the mixer. ssm_state speaks of mamba and rwkv, kv_cache of the others."""

    kv_cache: bool | None = None
    ssm_state: bool | None = None

    @property
    def kept(self) -> bool:
        return self.kv_cache is not False and self.ssm_state is not False


class LayerTemplate(Block):
    mixer: AnyMixer
    ffn: FFNSpec
    norm: NormSpec = NormSpec()
    residual: ResidualSpec = ResidualSpec()
    state: KeepSpec = KeepSpec()
