"""Mixers that other packages bring: their specs, found by name when a file uses one, and never before.

A package names the spec of its mixer in its metadata, and `pip install` is all that its users do:

    [project.entry-points."eulerstack.mixers"]
    min_gru = "min_gru.spec:MinGRUSpec"

A notebook says `es.register("min_gru", MinGRUSpec)`. Then a file may write `mixer: {type: min_gru, min_gru: {...}}`.
"""

import re
import sys
import warnings
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, create_model
from pydantic_core import PydanticCustomError, PydanticKnownError

from .base import Block
from .errors import Problem, SpecWarning

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from .stack import StackSpec

GROUP = "eulerstack.mixers"
OWN = ("attention", "branched", "hyena", "linear_attention", "mamba", "retnet", "rwkv")
"""The language's own mixers, which no extension can replace."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_known: dict[str, type["ExtensionMixer"]] = {}


class ExtensionSpec(Block):
    """The options of a mixer of your own: its fields are the keys of the sub-object, with their defaults and bounds.

    MIXER is the Mixer class, or where it is: "package.module:Class" is imported when a stack is built, so that a file
    is validated without torch.
    """

    MIXER: ClassVar[Any]

    def problems(self, stack: "StackSpec") -> Iterable[Problem]:
        """Broken rules between these keys, or between them and the stack's; a Problem's key is one of these keys."""
        return ()


class ExtensionMixer(Block):
    """A template's mixer: `type`, and its options under the key of the same name. `origin`: who brought it."""

    origin: ClassVar[str]
    type: str

    @property
    def spec(self) -> ExtensionSpec:
        spec: ExtensionSpec = getattr(self, self.type)
        return spec

    def __reduce__(self) -> Any:
        return _again, (self.type, self.spec)


def _again(name: str, spec: ExtensionSpec) -> ExtensionMixer:
    """What was pickled: the class of each extension is made in each process."""
    model = find(name)
    if model is None:
        raise ValueError(f"the mixer {name!r} is not installed here")
    return model(type=name, **{name: spec})


def register(name: str, spec: type[ExtensionSpec]) -> None:
    """Let stack files name a mixer of your own, in this process; a package had better use the entry point.

    Raises ValueError for a name that cannot be used, and a spec that names no mixer.
    """
    _known[name] = _mixer(name, spec, f"import {spec.__module__}, which registers it")


def find(name: str) -> type[ExtensionMixer] | None:
    """The mixer of this name that was registered, or is installed. Raises ValueError where it is there but broken."""
    if name not in _known:
        found = [entry for entry in _entries(tuple(sys.path)) if entry.name == name]
        if not found:
            return None
        if len({entry.value for entry in found}) > 1:
            raise ValueError(f"more than one package brings {name!r}: {' and '.join(map(_package, found))}")
        _known[name] = _loaded(found[0])
    return _known[name]


def names() -> list[str]:
    """The names that `find` knows; loads nothing."""
    return sorted({*_known, *(entry.name for entry in _entries(tuple(sys.path)))})


def known() -> dict[str, type[ExtensionMixer]]:
    """The extensions that were registered or used so far."""
    return dict(_known)


def installed() -> dict[str, type[ExtensionMixer]]:
    """All of them; one that does not load is left out with a warning."""
    for name in names():
        try:
            find(name)
        except ValueError as error:
            warnings.warn(SpecWarning(str(error)), stacklevel=2)
    return known()


def or_extension(value: Any, own: ValidatorFunctionWrapHandler) -> Any:
    """A mixer of the language, or where it has none of this name, an extension's."""
    if isinstance(value, ExtensionMixer):
        return value
    try:
        return own(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = value.get("type") if isinstance(value, dict) else None
        if first["type"] != "union_tag_invalid" or first["loc"] or not isinstance(name, str):
            raise
    try:
        model = find(name)
    except ValueError as error:
        fix = "mend or uninstall that package, or use another mixer"
        raise PydanticCustomError("extension", "{message}", {"message": str(error), "fix": fix}) from None
    if model is None:
        tags = ", ".join([first["ctx"]["expected_tags"], *map(repr, names())])
        raise PydanticKnownError("union_tag_invalid", {**first["ctx"], "expected_tags": tags})
    # the name is part of an error's path, as the tags of the language's own mixers are
    return TypeAdapter(dict[str, model]).validate_python({name: value})[name]  # type: ignore[valid-type]


def extended(schema: dict[str, Any], mixers: dict[str, type[ExtensionMixer]]) -> dict[str, Any]:
    """The language's JSON Schema with these mixers wherever a mixer may stand."""
    for name, model in mixers.items():
        own = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        schema["$defs"] |= {f"{name}.{key}": value for key, value in own.pop("$defs", {}).items()}
        schema["$defs"][name] = own
        for choice in _choices(schema):
            choice["oneOf"].append({"$ref": f"#/$defs/{name}"})
            choice["discriminator"]["mapping"][name] = f"#/$defs/{name}"
    return schema


def _choices(node: Any) -> Iterable[dict[str, Any]]:
    """The places of a schema where a mixer may stand."""
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and "attention" in node.get("discriminator", {}).get("mapping", {}):
        yield node
    for item in items:
        yield from _choices(item)


@cache
def _entries(path: tuple[str, ...]) -> tuple["EntryPoint", ...]:
    """The mixers that the packages on this path name; read once."""
    from importlib.metadata import entry_points  # noqa: PLC0415 - a tenth of `validate`, and few files need it

    return tuple(entry_points(group=GROUP))


def _loaded(entry: "EntryPoint") -> type[ExtensionMixer]:
    try:
        return _mixer(entry.name, entry.load(), f"install {_package(entry)}")
    except Exception as error:  # whatever another package's code may raise
        raise ValueError(
            f"the mixer {entry.name!r} of {_package(entry)} does not load: {type(error).__name__}: {error}"
        ) from error


def _package(entry: "EntryPoint") -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _mixer(name: str, spec: Any, origin: str) -> type[ExtensionMixer]:
    """The template's block for a spec: `type`, and the spec under its name."""
    if name in OWN:
        raise ValueError(f"{name!r} is a mixer of the language's own; give yours another name")
    if not _NAME.fullmatch(name) or hasattr(ExtensionMixer, name) or name in ExtensionMixer.model_fields:
        raise ValueError(f"{name!r} cannot be the name of a mixer; use another word of a-z, 0-9 and _")
    if not (isinstance(spec, type) and issubclass(spec, ExtensionSpec)):
        raise ValueError(f"the mixer {name!r} names {spec!r}, which is no subclass of eulerstack.spec.ExtensionSpec")
    if not isinstance(getattr(spec, "MIXER", None), str | type):
        raise ValueError(f'{spec.__name__} names no mixer; write MIXER: ClassVar = "package.module:Class" in it')
    required = any(field.is_required() for field in spec.model_fields.values())
    fields: Any = {"type": (Literal[name], ...), name: (spec, ... if required else Field(default_factory=spec))}
    block: type[ExtensionMixer] = create_model(spec.__name__ + "Mixer", __base__=ExtensionMixer, **fields)
    block.origin = origin
    return block
