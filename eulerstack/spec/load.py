"""From a file, a preset's name or a text to a StackSpec, and back."""

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import ValidationError

from ..paths import expand_home
from . import refused
from .change import change
from .check import idle_hints, turns, unused_templates
from .errors import Problem, SpecError, SpecWarning, near
from .keys import allowed, siblings
from .let import fill
from .mend import mend, misspelt_beside
from .stack import StackSpec
from .yaml import MAX_BYTES, Document, Path, dotted, parse, read_scalar

LOOKS = 8
"""How often a wrong file is mended and looked at again."""

PRESET_DIRS = (FilePath(__file__).parents[1] / "presets", FilePath(__file__).parents[2] / "presets")
"""Where the shipped presets are: in the wheel, and in a checkout."""


def load(source: str | FilePath, settings: Iterable[str] = ()) -> StackSpec:
    """The spec of a YAML file, of a shipped preset by its name, or of a checkpoint directory.

    settings: KEY=VALUE each, `model.d_model=512` or `layer_schedule.0.repeat=2`, put in before anything is checked.
    Raises SpecError that lists every problem with its line.
    """
    text, name = _read(source)
    document = parse(text, name)
    change(document, settings, siblings)
    document.extensions = _recorded(expand_home(source))
    return _validated(document, name)


def spec_of(given: StackSpec | str | FilePath) -> StackSpec:
    """The spec itself, or what `load` reads under a name. Raises ValueError for anything else."""
    if isinstance(given, StackSpec):
        return given
    if isinstance(given, str | FilePath):
        return load(given)
    raise ValueError(
        f"spec is a {type(given).__name__}: give a StackSpec, a YAML file, a preset's name or a checkpoint directory"
    )


def loads(text: str, source: str = "spec", settings: Iterable[str] = ()) -> StackSpec:
    """The spec of a YAML text; `source` is what the messages call it, `settings` as in `load`."""
    document = parse(text, source)
    change(document, settings, siblings)
    return _validated(document, source)


def from_data(data: dict[str, Any], source: str = "spec") -> StackSpec:
    """The spec of plain Python data in the shape of a stack file; `source` is what the messages call it."""
    return _validated(Document(data), source)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the YAML 1.2 reader would take for something else."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = read_scalar(text) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def with_hints(spec: StackSpec, changes: dict[str, Any]) -> StackSpec:
    """The spec with some training_hints replaced, keys of `muon` one by one; what they leave without an effect goes.

    Raises SpecError for values they may not have.
    """
    if not changes:
        return spec
    data = _data(spec)
    hints: dict[str, Any] = {**data["training_hints"], **changes}
    if isinstance(changes.get("muon"), dict):
        hints["muon"] = {**data["training_hints"].get("muon", {}), **changes["muon"]}
    idle = idle_hints(spec, hints["optimizer"], hints["schedule"])
    data["training_hints"] = {key: value for key, value in hints.items() if key in changes or key not in idle}
    return from_data(data)


def _validated(document: Document, source: str) -> StackSpec:
    if not isinstance(document.data, dict):
        fix = "a stack file is a mapping that starts with `schema_version: 1` and `model:`"
        raise SpecError([Problem("", "the file holds no mapping", fix, "Type", *document.place(()))], source)
    remarks = [f"let.{name} is in no expression" for name in fill(document)]
    document.data = _without_reserved(document.data, (), remarks)
    spec = _judged(document)
    if spec is None or document.problems:
        problems = [_from_outside(problem, document) for problem in document.problems]
        raise SpecError(sorted(problems, key=lambda p: (p.line or 0, p.column or 0)), source)
    remarks += [f"layer_templates.{name} is in no entry of layer_schedule" for name in unused_templates(spec)]
    for remark in remarks:
        warnings.warn(SpecWarning(f"{source}: {remark}"), stacklevel=3)
    return spec


def _from_outside(problem: Problem, document: Document) -> Problem:
    """The problem at the `--set` that gave its value, if one did."""
    for path, key in document.settings.items():
        if f"{problem.key}.".startswith(f"{dotted(path)}."):
            return replace(problem, place=f"--set {key}", line=None, column=None)
    return problem


def _judged(document: Document) -> StackSpec | None:
    """The spec, unless it has problems, which join the document's: what is wrong is mended to see what lies behind."""
    for path in tuple(document.doubtful):
        mend(document, path)
    for _ in range(LOOKS):
        try:
            return StackSpec.model_validate(document.data, context=document.doubtful)
        except ValidationError as error:
            if not _mended(error, document):
                break
    return None


def _mended(error: ValidationError, document: Document) -> bool:
    """Whether another look may show more than these problems."""
    found = list(_problems(error, document))
    document.problems += [problem for _, problem in found]
    before = document.data
    for path, problem in sorted(found, key=lambda pair: pair[1].category == "Missing key"):
        if path and problem.category != "Compatibility":
            mend(document, path, problem)
    return bool(document.data != before)


def _without_reserved(value: Any, path: Path, remarks: list[str]) -> Any:
    """The value without experimental.*, future.* and vendor.*.* keys, each of them remarked."""
    if isinstance(value, tuple | list):
        return tuple(_without_reserved(item, (*path, i), remarks) for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    free = path[-1:] in (("layer_templates",), ("branches",))  # whose keys are names
    reserved = [] if free else [key for key, item in value.items() if _is_reserved(key, item)]
    remarks += [f"{dotted((*path, key))} is reserved for extensions, and does nothing here" for key in reserved]
    kept = {key: item for key, item in value.items() if key not in reserved}
    return {key: _without_reserved(item, (*path, key), remarks) for key, item in kept.items()}


def _is_reserved(key: str, value: Any) -> bool:
    """experimental.X, future.X and vendor.NAME.X, dotted or nested."""
    first, *more = key.split(".")
    if first == "vendor":
        return len(more) > 1 or (
            isinstance(value, dict) and (bool(more) or all(isinstance(v, dict) for v in value.values()))
        )
    return first in ("experimental", "future") and (bool(more) or isinstance(value, dict))


def placed(source: str | FilePath, problems: list[Problem]) -> list[Problem]:
    """The problems with the lines and columns of their keys in the file."""
    document = parse(*_read(source))
    at = [document.place(_as_path(problem.key, document)) for problem in problems]
    return [replace(p, line=line, column=column) for p, (line, column) in zip(problems, at, strict=True)]


def dump(spec: StackSpec | str | FilePath, path: str | FilePath | None = None) -> str:
    """The spec, or what `load` reads under its name, as YAML that loads equal, every default written out.

    Also into a file if `path` is given.
    """
    text = yaml.dump(_data(spec_of(spec)), Dumper=_Dumper, sort_keys=False)
    if path is not None:
        expand_home(path).write_text(text, encoding="utf-8")
    return text


def _data(spec: StackSpec) -> dict[str, Any]:
    """The spec as plain data in the shape of a stack file, all defaults written out that a file may say."""
    data = spec.model_dump(mode="json", exclude_none=True)
    hints = spec.training_hints
    data["training_hints"].setdefault("grad_clip", None)  # None means no clipping, which is not the default
    for key in idle_hints(spec, hints.optimizer, hints.schedule):
        del data["training_hints"][key]  # a file that says what has no effect is refused
    if not turns(spec):
        del data["embedding"]["rope_theta"]  # a file that says it where nothing turns is refused
    return data


def hint_places(source: str | FilePath) -> dict[str, str]:
    """Where a stack file writes its training_hints: FILE:LINE by key, those of `muon` as muon.KEY."""
    text, file = _read(source)
    places = parse(text, file).places.items()
    return {dotted(path[1:]): f"{file}:{line}" for path, (line, _) in places if path[:1] == ("training_hints",)}


def presets() -> dict[str, FilePath]:
    """The shipped presets, by name."""
    return {file.stem: file for folder in PRESET_DIRS for file in sorted(folder.glob("*.yml"))}


def _read(source: str | FilePath) -> tuple[str, str]:
    path = expand_home(source)
    try:
        if (path / "spec.yml").is_file():
            path = path / "spec.yml"
        elif not path.is_file() and str(path) in (shipped := presets()):
            path = shipped[str(path)]
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_BYTES + 1), str(path)
    except FileNotFoundError:
        meant = near(path.stem, presets())
        fix = (
            f"did you mean the preset {meant!r}?"
            if meant
            else "give a YAML file or a preset's name (`eulerstack presets list`)"
        )
        problem = Problem("", "there is no such file", fix, "File")
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem("", f"cannot be read: {error}"[:200], "give a UTF-8 YAML file", "File")
    raise SpecError([problem], str(path))


def _recorded(folder: FilePath) -> dict[str, str]:
    """Where a checkpoint's extensions came from; nothing for what is no checkpoint."""
    try:
        found = json.loads((folder / "eulerstack.json").read_text()).get("extensions", {})
        return {str(name): str(origin) for name, origin in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _problems(error: ValidationError, document: Document) -> Iterator[tuple[Path, Problem]]:
    """Each problem and the path where it is mended."""
    for item in error.errors(include_url=False):
        if item["type"] == "too_short" and item["ctx"]["actual_length"] < len(item["input"]):
            continue  # its entries are wrong, and said so
        if item["type"] == "stack":
            for problem in item["ctx"]["problems"]:
                line, column = document.place(_as_path(problem.key, document))
                yield (), replace(problem, line=line, column=column)
        elif item["type"] != "missing" or not misspelt_beside(_written(item["loc"], document), document):
            path = _written(_location(item), document)
            problem = _field_problem(item, path, document)
            yield _place_to_mend(item, path, problem.near), problem


def _place_to_mend(item: Any, path: Path, meant: str | None) -> Path:
    """The key itself; the whole block, where nothing says which of several it is."""
    return path[:-1] if item["type"].startswith("union_tag") and meant is None else path


def _as_path(key: str, document: Document) -> Path:
    """The longest written part of a dotted key (template names may hold dots)."""
    return max((p for p in document.places if key == dotted(p) or key.startswith(dotted(p) + ".")), key=len, default=())


def _written(location: tuple[Any, ...], document: Document) -> Path:
    """The path as the file has it: Pydantic puts a union's tag between its keys."""
    path: list[Any] = []
    value, tagged = document.data, False
    for step in location:
        if isinstance(step, str) and step.startswith("<") and not (isinstance(value, dict) and step in value):
            continue  # a schedule's tag
        union = (path[-1:] and path[-1] in UNIONS) or path[-2:-1] == ["branches"]
        tagged = bool(union) and not tagged and isinstance(value, dict) and step in (value.get("type"), _variant(value))
        if tagged or not isinstance(value, dict | tuple | list):
            continue  # a step into what holds nothing is a tag too
        path.append(step)
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, tuple | list) and isinstance(step, int) and step < len(value):
            value = value[step]
    return tuple(path)


UNIONS = ("mixer", "ffn", "tokenizer_contract", "mamba")
"""Keys whose blocks are one of several."""


def _variant(value: dict[str, Any]) -> Any:
    """The tag of a mamba's sub-object: mamba2 unless it says otherwise."""
    return None if "type" in value else value.get("variant", "mamba2")


def _field_problem(item: Any, path: Path, document: Document) -> Problem:
    category, value = _category(item, path), _value(item, path)
    choice, meant = _choice(item, path, document), _meant(item, path, document)
    message, fix = _explain(item, path, choice, meant)
    if item["type"] == "union_tag_invalid" and item["ctx"]["tag"] in document.extensions:
        fix = f"{document.extensions[item['ctx']['tag']]}: this checkpoint was made with it"
    return Problem(dotted(path), message, fix, category, *document.place(path), None, value, choice, meant)


def _category(item: Any, path: Path) -> str:
    kind, name = item["type"], path[-1] if path else ""
    if kind == "extra_forbidden":
        return "Unsupported" if name in refused.KEYS else "Unknown key"
    if kind in ("missing", "union_tag_not_found"):
        return "Missing key"
    if kind == "extension":
        return "Unsupported"
    if kind in WORDS:
        word = _value(item, path)
        return "Unsupported" if isinstance(word, str) and word in refused.VALUES else "Choice"
    return "Type" if kind.endswith("_type") or kind == "int_from_float" else "Range"


def _value(item: Any, path: Path) -> Any:
    """The wrong value itself; a missing key has none, and a union's error holds the block around it."""
    value = item["input"]
    if item["type"] in ("missing", "union_tag_not_found"):
        return None
    return value.get(path[-1]) if item["type"] == "union_tag_invalid" and isinstance(value, dict) else value


def _choice(item: Any, path: Path, document: Document) -> list[str] | str:
    """The keys or words of which one may stand there, or a phrase for what may."""
    context = item.get("ctx", {})
    expected = context.get("expected") or context.get("expected_tags")
    if item["type"] == "extra_forbidden":
        return siblings(path, document.data)
    if item["type"] in WORDS and expected:
        return [word.strip(" '\"") for word in expected.replace(" or ", ", ").split(",")]
    return allowed(path, document.data)


def _meant(item: Any, path: Path, document: Document) -> str | None:
    """The word or key that a misspelt one stands for; a block's type shows in the key of its sub-object too."""
    choice, value, block = _choice(item, path, document), _value(item, path), item["input"]
    if item["type"] == "extra_forbidden" and _category(item, path) == "Unknown key":
        return near(path[-1], choice)
    if item["type"] not in (*WORDS, "union_tag_not_found") or isinstance(choice, str):
        return None
    shown = [word for word in choice if isinstance(block, dict) and word in block]
    return (shown[0] if shown else None) or (near(value, choice) if isinstance(value, str) else None)


def _location(item: Any) -> tuple[Any, ...]:
    """Where it is wrong; a union's own errors are about its discriminator."""
    location: tuple[Any, ...] = item["loc"]
    if not item["type"].startswith("union_tag"):
        return location
    return (*location, "variant" if "variant" in item["ctx"]["discriminator"] else "type")


def _explain(item: Any, path: Path, choice: list[str] | str, meant: str | None) -> tuple[str, str]:
    kind, value, context = item["type"], _value(item, path), item.get("ctx", {})
    name = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        return _unknown_key(name, choice, meant)
    if kind in ("missing", "union_tag_not_found"):
        return "is required and missing", f"add `{name}: {meant or ''}`".replace(": `", ":`")
    if kind in WORDS:
        return _wrong_word(value, list(choice), meant)
    if isinstance(value, float) and kind in ("int_type", "int_from_float"):
        return f"{value!r} is not a whole number", "write a whole number"
    return _WANTED.get(kind, lambda v, c: (f"{_show(v)}: {item['msg']}", "correct the value"))(value, context)


WORDS = ("literal_error", "union_tag_invalid")
"""Pydantic's names for a word that is none of those allowed."""

_WANTED = {
    "int_type": lambda v, c: (f"{_show(v)} is not a whole number", "write a whole number without quotes"),
    "float_type": lambda v, c: (f"{_show(v)} is not a number", "write a number without quotes"),
    "bool_type": lambda v, c: (f"{_show(v)} is neither true nor false", "write true or false"),
    "string_type": lambda v, c: (f"{_show(v)} is not a text", "write a text, in quotes if it looks like a number"),
    "model_type": lambda v, c: (f"{_show(v)} is not a mapping", "write its keys below it, indented"),
    "model_attributes_type": lambda v, c: (f"{_show(v)} is not a mapping", "write its keys below it, indented"),
    "dict_type": lambda v, c: (f"{_show(v)} is not a mapping", "write its keys below it, indented"),
    "tuple_type": lambda v, c: (f"{_show(v)} is not a list", "write a list: one `- item` a line"),
    "too_short": lambda v, c: ("is empty" if not v else "has one entry", f"give {_at_least(c['min_length'])}"),
    "string_too_short": lambda v, c: ("is empty", "give at least one character"),
    "string_too_long": lambda v, c: (f"has {len(v)} characters", f"use {c['max_length']} or fewer"),
    "string_pattern_mismatch": lambda v, c: (
        f"{_show(v)} cannot be a name",
        "use letters, digits, `_`, `-`, `.` and `+`",
    ),
    "too_long": lambda v, c: (f"has {len(v)} entries", f"give {c['max_length']}"),
    "extension": lambda v, c: (str(c["message"]), str(c["fix"])),
    "finite_number": lambda v, c: (f"{v!r} is not finite", "write a finite number"),
    "greater_than": lambda v, c: (f"{_show(v)} is not greater than {c['gt']}", f"write a number above {c['gt']}"),
    "greater_than_equal": lambda v, c: (f"{_show(v)} is less than {c['ge']}", f"write {c['ge']} or more"),
    "less_than": lambda v, c: (f"{_show(v)} is not less than {c['lt']}", f"write a number below {c['lt']}"),
    "less_than_equal": lambda v, c: (f"{_show(v)} is more than {c['le']}", f"write {c['le']} or less"),
}


def _at_least(count: int) -> str:
    return "at least one entry" if count == 1 else f"{count} entries or more"


def _show(value: Any) -> str:
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if isinstance(value, tuple):
        text = repr(list(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong_word(value: Any, choice: list[str], meant: str | None) -> tuple[str, str]:
    words = ", ".join(map(str, choice))
    if isinstance(value, str) and value in refused.VALUES:
        return f"{value!r} {refused.VALUES[value]}", f"use one of {words}"
    return f"{_show(value)} is not one of {words}", f"did you mean {meant!r}?" if meant else f"use one of {words}"


def _unknown_key(name: str, choice: list[str] | str, meant: str | None) -> tuple[str, str]:
    if name.partition(".")[0] in ("experimental", "future", "vendor"):
        return "is no key of its own", "write experimental.KEY, future.KEY or vendor.NAME.KEY"
    if name in refused.KEYS:
        return refused.KEYS[name]
    fix = f"did you mean {meant!r}?" if meant else f"remove it; the keys here are {', '.join(choice)}"
    return "is not a key of the language here", fix
