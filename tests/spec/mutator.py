"""Presets with a few random mistakes each, made from a seed: what people, editors and programs do to files.

`python -m tests.spec.mutator FIRST COUNT` loads that many of them, without torch, and prints what came of it as JSON.
"""

import json
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eulerstack.spec import SpecError, expand, loads, presets
from eulerstack.spec.yaml import parse

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, "", " ", "x", "no", "64",
    "1e400", ".inf", "-.inf", ".nan", "0x" + "f" * 70, "${1/0}", "${let.a}", "${" + "(" * 90, "${2 ** 9}", "${1 + 1}", "${64}",
    "\u202e\u200b", "\N{PILE OF POO}", "e\u0301", "\x00", "\x85", "a\tb", "a" * 5000, [], [1, 2], [None], [[]], {}, {"type": None},
    {"type": "mamba"}, {"type": ["retnet"]}, {"variant": {}}, {"pattern": "a"}, {"": ""}, {"let": {}}, {"experimental": {"a": 1}},
]  # fmt: skip
"""Values to put where others stand; texts that begin with . or 0x or $ are written without quotes."""


def mutated(seed: int) -> str:
    """The text of a preset with one to four mistakes in its data, and sometimes one in its text."""
    draw = random.Random(seed)
    data = _lists(parse(draw.choice(FILES), "preset").data)
    for _ in range(draw.randint(1, 4)):
        data = draw.choice(CHANGES)(draw, data)
    lines = written(data)
    if draw.random() < 0.25:
        lines = draw.choice(EDITS)(draw, lines)
    return "\n".join(lines) + "\n"


def _lists(value: Any) -> Any:
    """A copy whose sequences are lists."""
    return json.loads(json.dumps(value))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of the data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(value, key), *places(item)]]


def _drop(draw: random.Random, data: Any) -> Any:
    holder, key = draw.choice(places(data) or [({0: 0}, 0)])
    del holder[key]
    return data


def _retype(draw: random.Random, data: Any) -> Any:
    holder, key = draw.choice(places(data) or [([0], 0)])
    holder[key] = draw.choice(ODD)
    return _lists(data)


def _wrap(draw: random.Random, data: Any) -> Any:
    holder, key = draw.choice(places(data) or [([0], 0)])
    holder[key] = draw.choice([[holder[key]], {str(key): holder[key]}, str(holder[key]), {"type": holder[key]}])
    return data


def _move(draw: random.Random, data: Any) -> Any:
    """A value under its key into another block, and sometimes out of its own."""
    found = places(data) or [({0: 0}, 0)]
    holder, key = draw.choice(found)
    value = _lists(holder[key])
    targets = [h for h, _ in found if isinstance(h, dict)]
    if targets:
        draw.choice(targets)[str(key)] = value
    if draw.random() < 0.5:
        holder.pop(key) if isinstance(holder, dict) else None
    return data


def _swap(draw: random.Random, data: Any) -> Any:
    found = places(data) or [([0], 0)]
    (a, i), (b, j) = draw.choice(found), draw.choice(found)
    a[i], b[j] = _lists(b[j]), _lists(a[i])
    return data


def _rename(draw: random.Random, data: Any) -> Any:
    holder, key = draw.choice([p for p in places(data) if isinstance(p[0], dict)] or [({"a": 0}, "a")])
    at = draw.randrange(len(str(key)) + 1)
    new = draw.choice(
        [str(key)[:at] + str(key)[at + 1 :], str(key).upper(), f"{key}\u200b", str(key)[::-1], "7", "a.b"]
    )
    holder[new] = holder.pop(key)
    return data


def _number(draw: random.Random, data: Any) -> Any:
    """A number by a factor: the mutation that most often leaves a file right."""
    found = [(h, k) for h, k in places(data) if isinstance(h[k], int | float) and not isinstance(h[k], bool)]
    holder, key = draw.choice(found or [([1], 0)])
    try:
        scaled = holder[key] * draw.choice([2, 3, 0.5, 4, -1, 10**6])
        holder[key] = int(scaled) if isinstance(holder[key], int) else scaled
    except (OverflowError, ValueError):
        holder[key] = 1
    return data


def _word(draw: random.Random, data: Any) -> Any:
    """A word of the language, or of the file, for another."""
    words = [h[k] for h, k in places(data) if isinstance(h[k], str)] + ["attention", "mamba1", "moe", "post", "none"]
    holder, key = draw.choice([(h, k) for h, k in places(data) if isinstance(h[k], str)] or [([0], 0)])
    holder[key] = draw.choice(words)
    return data


CHANGES: list[Callable[[random.Random, Any], Any]] = [_drop, _retype, _wrap, _move, _swap, _rename, _number, _word]


def written(value: Any, indent: str = "") -> list[str]:
    """YAML lines in block style; odd texts now and then without quotes."""
    if isinstance(value, dict) and value:
        pairs = [(f"{indent}{_scalar(str(key), key=True)}:", item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{indent}-", item) for item in value]
    else:
        return [f"{indent}{_scalar(value)}"]
    lines = []
    for head, item in pairs:
        deep = isinstance(item, dict | list) and item
        lines += [head, *written(item, indent + "  ")] if deep else [f"{head} {_scalar(item)}"]
    return lines


def _scalar(value: Any, key: bool = False) -> str:
    plain = isinstance(value, str) and (value[:1] in ".$7" or value[:2] in ("0x", "-."))
    if isinstance(value, str) and (plain or (value.isidentifier() and value.isascii())):
        return value
    return json.dumps(value, ensure_ascii=key).replace("Infinity", ".inf").replace("NaN", ".nan")


def _edit(at: Callable[[random.Random, list[str], int], list[str]]) -> Callable[[random.Random, list[str]], list[str]]:
    return lambda draw, lines: at(draw, lines, draw.randrange(len(lines)))


def _letter(draw: random.Random, lines: list[str], i: int) -> list[str]:
    column = draw.randrange(len(lines[i]) + 1)
    letter = draw.choice("\t:{}[],&*!|>'\"%@`#?- \n\u200b\x07<")
    return [*lines[:i], lines[i][:column] + letter + lines[i][column:], *lines[i + 1 :]]


EDITS = [
    _edit(lambda draw, lines, i: [*lines[:i], *lines[i + 1 :]]),
    _edit(lambda draw, lines, i: [*lines[: i + 1], *lines[i:]]),
    _edit(lambda draw, lines, i: [*lines[:i], " " * draw.randint(1, 3) + lines[i], *lines[i + 1 :]]),
    _edit(lambda draw, lines, i: [*lines[:i], "\t" + lines[i].lstrip(), *lines[i + 1 :]]),
    _edit(lambda draw, lines, i: [*lines[:i], lines[i].replace(": ", ": &a ", 1), *lines[i + 1 :], "let: *a"]),
    _edit(lambda draw, lines, i: [*lines[:i], lines[i].partition(":")[0] + ": *a", *lines[i + 1 :]]),
    _edit(lambda draw, lines, i: [*lines[:i], lines[i].partition(":")[0] + ":", *lines[i + 1 :]]),
    _edit(lambda draw, lines, i: lines[: i + 1]),
    _edit(lambda draw, lines, i: [*lines[:i], "---", *lines[i:]]),
    _edit(lambda draw, lines, i: [*lines[:i], lines[i].replace(": ", ": !!int ", 1), *lines[i + 1 :]]),
    _edit(_letter), _edit(_letter), _edit(_letter),
]  # fmt: skip
FILES = [path.read_text(encoding="utf-8") for path in presets().values()]


def outcome(seed: int) -> tuple[str, float]:
    """`valid`, `refused` or a traceback; and the seconds of processor time."""
    text, start = mutated(seed), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expand(loads(text))
        came = "valid"
    except SpecError as error:
        said = all(p.message and p.fix and p.see for p in error.problems)
        came = "refused" if said and error.problems else "an error that says nothing"
    except Exception:
        came = traceback.format_exc()
    return came, time.process_time() - start


def main(first: int, count: int) -> dict[str, Any]:
    """The seeds of valid files, what went wrong by seed, the longest time in seconds, the peak of memory in bytes."""
    valid, wrong, longest = [], {}, (0.0, 0)
    for seed in range(first, first + count):
        came, seconds = outcome(seed)
        longest = max(longest, (seconds, seed))
        valid += [seed] if came == "valid" else []
        wrong |= {} if came in ("valid", "refused") else {seed: came}
    status = Path("/proc/self/status").read_text()  # getrusage would count the process that forked this one
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    return {"valid": valid, "wrong": wrong, "longest": longest, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
