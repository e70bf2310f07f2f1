"""The layer schedule: templates one after the other, repeated, nested, with values of their own, sharing weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_serializer

from .base import Block
from .mixers import Positive

Repeat = Annotated[int, Field(ge=1, le=4096)]


class _Given(Block):
    """A block whose unset keys mean nothing: null is a value here, and is written out again."""

    @model_serializer(mode="plain")
    def given(self) -> dict[str, Any]:
        """The keys that were set, nested blocks as mappings."""
        values = {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}
        return {key: value.given() if isinstance(value, _Given) else value for key, value in values.items()}


class ResidualOverride(_Given):
    """Of the residual's values."""

    scaling: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """What is added is multiplied with this."""


class AttentionOverride(_Given):
    """Of attention's values."""

    window: Positive | None = None
    """How many tokens a query sees; null: all."""
    attn_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of attention weights that training drops."""


class NormOverride(_Given):
    """Of the norms' values."""

    type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """The norm."""
    position: Literal["pre", "post", "sandwich"] = "pre"
    """Where it stands."""


class FFNOverride(_Given):
    """Of the FFN's values."""

    activation: Literal["gelu", "relu", "relu2", "silu", "swiglu", "geglu", "reglu"] = "gelu"
    """One of the template's FFN."""


class OverrideSpec(_Given):
    """Values that an entry's layers have instead of their template's."""

    residual: ResidualOverride = ResidualOverride()
    """Of the residual connection."""
    attention: AttentionOverride = AttentionOverride()
    """Of attention."""
    norm: NormOverride = NormOverride()
    """Of the norms."""
    ffn: FFNOverride = FFNOverride()
    """Of the FFN."""


class ScheduleEntry(Block):
    """Layers of one template; shared weights as in Zamba2 (arXiv 2411.15242)."""

    template: str
    """One of layer_templates."""
    repeat: Repeat = 1
    """How many layers of it."""
    override: OverrideSpec | None = None
    """What these layers have instead."""
    shared: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Layers with the same name here have one set of weights, and each its own state."""


class PatternEntry(Block):
    """A pattern such as `m r m a`, repeated."""

    pattern: "Pattern"
    """Names of templates in one text, or a list of names and entries."""
    repeat: Repeat = 1
    """How often."""


def _text_or_list(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<list>"


def _which_entry(value: Any) -> str:
    patterned = "pattern" in value if isinstance(value, dict) else isinstance(value, PatternEntry)
    return "<pattern>" if patterned else "<template>"


def _which_item(value: Any) -> str:
    return "<name>" if isinstance(value, str) else _which_entry(value)


Entry = Annotated[
    Annotated[ScheduleEntry, Tag("<template>")] | Annotated[PatternEntry, Tag("<pattern>")],
    Discriminator(_which_entry),
]
Item = Annotated[
    Annotated[str, Tag("<name>")]
    | Annotated[ScheduleEntry, Tag("<template>")]
    | Annotated[PatternEntry, Tag("<pattern>")],
    Discriminator(_which_item),
]
Pattern = Annotated[
    Annotated[str, Field(max_length=10_000), Tag("<text>")]
    | Annotated[tuple[Item, ...], Field(min_length=1, strict=False), Tag("<list>")],
    Discriminator(_text_or_list),
]


@dataclass(frozen=True)
class Placed:
    """A use of a template, the key of the schedule that names it, and how many layers it stands for."""

    key: str
    template: str
    layers: int
    override: OverrideSpec | None = None
    shared: str | None = None


def uses(entry: ScheduleEntry | PatternEntry | str, key: str, times: int = 1) -> Iterator[Placed]:
    """What an entry names, each once, whatever the repeats."""
    if isinstance(entry, str):
        yield Placed(key, entry, times)
    elif isinstance(entry, ScheduleEntry):
        yield Placed(f"{key}.template", entry.template, times * entry.repeat, entry.override, entry.shared)
    else:
        for part, item in _parts(entry, f"{key}.pattern"):
            yield from uses(item, part, times * entry.repeat)


def unrolled(entry: ScheduleEntry | PatternEntry | str, key: str) -> Iterator[Placed]:
    """The layers that an entry stands for, first to last."""
    if isinstance(entry, PatternEntry):
        once = [place for part, item in _parts(entry, f"{key}.pattern") for place in unrolled(item, part)]
        yield from once * entry.repeat
    else:
        for place in uses(entry, key):
            yield from [place] * place.layers


def _parts(entry: PatternEntry, key: str) -> Iterator[tuple[str, ScheduleEntry | PatternEntry | str]]:
    """The entries of a pattern and their keys."""
    if isinstance(entry.pattern, str):
        yield from ((key, name) for name in entry.pattern.split())
    else:
        yield from ((f"{key}.{i}", item) for i, item in enumerate(entry.pattern))
