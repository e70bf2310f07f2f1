"""presets list: a line a preset, its figures read off the header that a test keeps true; loads no torch."""

import re
from collections import Counter
from pathlib import Path

from ..spec import expand, load, presets
from .words import count_mixers

FIGURES = {"parameters": r"^# parameters: (.+)$", "state at 8k": r"^# state at 8k: (.+)$"}
SHOWN = 3
NO_PURPOSE = re.compile(r"^#\s*(yaml-language-server:|Source:|parameters:|state at 8k:)")


def listing() -> str:
    """All presets as a table."""
    head = ("name", *FIGURES, "layers", "what it is for")
    rows = [head, *(_row(name, path) for name, path in presets().items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(name: str, path: Path) -> tuple[str, ...]:
    text = path.read_text(encoding="utf-8")
    found = [re.search(pattern, text, re.MULTILINE) for pattern in FIGURES.values()]
    figures = [match[1] if match else "?" for match in found]
    return (name, *figures, _layers(name), _purpose(text))


def _layers(name: str) -> str:
    counts: Counter[str] = count_mixers(expand(load(name)))
    if len(counts) > SHOWN:
        return f"{counts.total()} of {len(counts)} mixers"
    return ", ".join(f"{number} {mixer}" for mixer, number in counts.items())


def _purpose(text: str) -> str:
    """The first line of the header that is no modeline, source or figure."""
    header = (line for line in text.splitlines() if line.startswith("#") and not NO_PURPOSE.match(line))
    return next(header, "").lstrip("# ")
