"""validate: a file's problems as sentences, or as JSON for programs. Loads torch only to report on realism."""

import json
import warnings
from dataclasses import asdict
from typing import Any

from ..spec import Problem, SpecError, StackSpec, expand, load


def say(file: str, settings: tuple[str, ...], realism: bool) -> None:
    """Raises SpecError with every problem; prints what is unlikely to be meant, if asked."""
    spec = load(file, settings)
    for problem in _report(spec, file, realism):
        print(problem.render(file))
    print(f"OK: {spec.model.name}, {len(expand(spec))} layers")


def as_json(file: str, settings: tuple[str, ...], realism: bool) -> tuple[str, bool]:
    """`errors` and `warnings`, both lists of problems, as JSON; and whether the file is good."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            spec = load(file, settings)
    except SpecError as error:
        return _written(error.source, error.problems, []), False
    remarks = [{"message": str(warning.message)} for warning in said]
    return _written(file, [], [*remarks, *map(_plain, _report(spec, file, realism))]), True


def _report(spec: StackSpec, file: str, realism: bool) -> list[Problem]:
    if not realism:
        return []
    from .report import report

    return report(spec, file)


def _written(file: str, errors: list[Problem], remarks: list[dict[str, Any]]) -> str:
    whole = {"file": file, "ok": not errors, "errors": [_plain(p) for p in errors], "warnings": remarks}
    return json.dumps(whole, indent=2, default=str)


def _plain(problem: Problem) -> dict[str, Any]:
    plain = {"path": problem.key, **asdict(problem), "see": problem.see}
    del plain["key"]
    return plain
