"""From templates and a schedule to a flat tuple of layers: the only place that knows either."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ffn import FFNSpec, NoFFN
from .layer import KeepSpec, LayerTemplate, NormSpec, ResidualSpec
from .load import spec_of
from .mixers import AttentionMixer, MixerSpec
from .schedule import OverrideSpec, Placed, unrolled
from .stack import StackSpec


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what it mixes with, how wide its FFN is (0: none), and where it came from.

    origin is the key of the schedule that names it, override what it has instead of its template's values, and
    weights_of the layer whose weights it uses (its own, unless it shares them).
    """

    index: int
    template: str
    origin: str
    override: OverrideSpec | None
    weights_of: int
    mixer_type: str
    mixer: MixerSpec
    ffn: FFNSpec
    hidden: int
    norm: NormSpec
    residual: ResidualSpec
    state: KeepSpec


def expand(spec: StackSpec | str | Path) -> tuple[LayerSpec, ...]:
    """The layers of the schedule, first to last; of a spec, or of what `load` reads under its name."""
    spec = spec_of(spec)
    places = _places(spec)
    first: dict[str, int] = {}
    for index, place in enumerate(places):
        if place.shared is not None:
            first.setdefault(place.shared, index)
    owners = [index if p.shared is None else first[p.shared] for index, p in enumerate(places)]
    return tuple(_layer(spec, i, *pair) for i, pair in enumerate(zip(places, owners, strict=True)))


def ahead(spec: StackSpec) -> tuple[tuple[LayerSpec, ...], ...]:
    """The layers of each module of a multi-token head, numbered on from the schedule's; none without such a head."""
    if (mtp := spec.head.mtp) is None:
        return ()
    start, place = len(_places(spec)), Placed("head.mtp", mtp.head_template, mtp.head_layers)
    firsts = range(start, start + mtp.n_predict * mtp.head_layers, mtp.head_layers)
    return tuple(tuple(_layer(spec, i, place, i) for i in range(f, f + mtp.head_layers)) for f in firsts)


def _places(spec: StackSpec) -> list[Placed]:
    return [p for i, entry in enumerate(spec.layer_schedule) for p in unrolled(entry, f"layer_schedule.{i}")]


def _layer(spec: StackSpec, index: int, place: Placed, owner: int) -> LayerSpec:
    template = overridden(spec.layer_templates[place.template], place.override)
    return LayerSpec(
        index=index,
        template=place.template,
        origin=place.key,
        override=place.override,
        weights_of=owner,
        mixer_type=template.mixer.type,
        mixer=template.mixer.spec,
        ffn=template.ffn,
        hidden=_hidden(spec, template.ffn),
        norm=template.norm,
        residual=template.residual,
        state=template.state,
    )


def overridden(template: LayerTemplate, override: OverrideSpec | None) -> LayerTemplate:
    """The template with an entry's own values, which were checked against it."""
    if override is None:
        return template
    changes: dict[str, Any] = {}
    for key, values in override.given().items():
        if key == "attention":
            assert isinstance(template.mixer, AttentionMixer)
            attention = template.mixer.attention.model_copy(update=values)
            changes["mixer"] = template.mixer.model_copy(update={"attention": attention})
        else:
            changes[key] = getattr(template, key).model_copy(update=values)
    return template.model_copy(update=changes)


def _hidden(spec: StackSpec, ffn: FFNSpec) -> int:
    """Width of the FFN: the ratio times d_model, exactly."""
    if isinstance(ffn, NoFFN):
        return 0
    return round((ffn.mlp_ratio or spec.model.mlp_ratio) * spec.model.d_model)
