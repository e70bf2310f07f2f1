"""Runs verbs in forks of one process, so that torch is loaded once, with an output that takes little or nothing."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import eulerstack.training.cli  # noqa: F401 - before the forks
from eulerstack.cli.main import main


def spoil(kind: str) -> None:
    """What standard output is, as a shell makes it before a process begins."""
    if kind == "read by nobody":
        mine, theirs = os.pipe()
        os.close(mine)
        os.dup2(theirs, 1)
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif kind == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
    elif kind == "ascii":
        sys.stdout.reconfigure(encoding="ascii", errors="strict")  # type: ignore[attr-defined]


def run(words: list[str], kind: str, said: Path) -> None:
    """In a child, which ends with the verb's code; `said` gets what it prints, as far as its output takes any."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(said.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), number)
    spoil(kind)
    sys.argv = ["eulerstack", *words]
    code: Any = 1
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    try:  # as Python does when it ends; without the rest, which takes longer than the verbs
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except Exception:
        code = 120
    os._exit(code)


runs: dict[str, list[Any]] = json.loads(sys.argv[1])
codes = {}
for place, (kind, words) in runs.items():
    child = os.fork()
    if child == 0:
        run(words, kind, Path(place))
    codes[place] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
