"""From templates and a schedule to a flat tuple of layers: the only place that knows either."""

from dataclasses import dataclass

from .ffn import FFNSpec, NoFFN
from .layer import KeepSpec, NormSpec, ResidualSpec
from .mixers import MixerSpec
from .stack import StackSpec


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what it mixes with, how wide its FFN is (0: none), and which template it came from."""

    index: int
    template: str
    mixer_type: str
    mixer: MixerSpec
    ffn: FFNSpec
    hidden: int
    norm: NormSpec
    residual: ResidualSpec
    state: KeepSpec


def expand(spec: StackSpec) -> tuple[LayerSpec, ...]:
    """The schedule's layers, first to last."""
    names = [entry.template for entry in spec.layer_schedule for _ in range(entry.repeat)]
    return tuple(_layer(spec, index, name) for index, name in enumerate(names))


def _layer(spec: StackSpec, index: int, name: str) -> LayerSpec:
    template = spec.layer_templates[name]
    return LayerSpec(
        index=index,
        template=name,
        mixer_type=template.mixer.type,
        mixer=template.mixer.spec,
        ffn=template.ffn,
        hidden=_hidden(spec, template.ffn),
        norm=template.norm,
        residual=template.residual,
        state=template.state,
    )


def _hidden(spec: StackSpec, ffn: FFNSpec) -> int:
    """Width of the FFN: the ratio times d_model, exactly."""
    if isinstance(ffn, NoFFN):
        return 0
    return round((ffn.mlp_ratio or spec.model.mlp_ratio) * spec.model.d_model)
