"""muP (Yang et al. 2022, arXiv 2203.03466): what weights are scaled with so that another width's learning rate fits.

As their table 8: hidden weights' Adam rate falls as 1 / fan_in, vectors' and embeddings' not at all, and the logits are
divided by the width. What a width does not widen (routers, gates, Mamba's B and C) starts as small as an output must.
Products of queries and keys are the mixers': `score_scale`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .layers.init import is_drawn_normal
from .layers.moe import StackedLinear
from .spec import StackSpec


class Scale(NamedTuple):
    """Of one parameter, over what the base has: its first deviation, and its learning rate under each optimizer."""

    start: float = 1.0
    adamw: float = 1.0
    muon: float = 1.0


class MuP(NamedTuple):
    """`scales` by parameters' names; those without one are not scaled."""

    shrunk: float  # the base's width over the stack's: of logits, and of gradients with them
    scales: dict[str, Scale]

    def of(self, name: str) -> Scale:
        return self.scales.get(name, Scale())


STANDARD = MuP(1.0, {})


def mup(stack: nn.Module, base: nn.Module, spec: StackSpec) -> MuP:
    """What a stack of `spec` scales, by the shapes of the stack at its base's widths."""
    shrunk = spec.model.base.d_model / spec.model.d_model
    return MuP(shrunk, dict(_scales(stack, base, spec.training_hints.init == "normal")))


def _scales(stack: nn.Module, base: nn.Module, normal: bool) -> Iterator[tuple[str, Scale]]:
    """Of the linear weights [out, in] and those of experts; the head's logits are scaled instead.

    Muon's steps have the spectral norm max(1, sqrt(out / in)), the right one at any width where both grow (Yang, Simon
    and Bernstein 2023, arXiv 2310.17813). Where only the inputs do it has to fall as 1 / sqrt(in). `normal`: one
    deviation is drawn at all widths.
    """
    for path, layer in stack.named_modules():
        if isinstance(layer, nn.Linear | StackedLinear) and path != "head":
            (outputs, inputs), wide = base.get_parameter(f"{path}.weight").shape[-2:], layer.weight.shape
            fan = inputs / wide[-1]
            narrow = fan**0.5 if outputs == wide[-2] else 1.0
            drawn = fan**0.5 if normal and is_drawn_normal(path) else 1.0
            yield f"{path}.weight", Scale(narrow * drawn, fan, narrow)
