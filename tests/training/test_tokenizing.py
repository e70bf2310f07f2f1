"""Tokens made in parts: the same by any number of processes, not lost when one is killed, never half there."""

import json
import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eulerstack.data import tokenizing
from eulerstack.data.corpus import Shard, list_files, shards
from eulerstack.data.tokenizing import Parts
from eulerstack.tokens import Bytes

FORK: Any = multiprocessing.get_context("fork")


@pytest.fixture
def mixed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Text files and lines of JSON, some of them bad, in parts of 700 bytes."""
    monkeypatch.setattr(tokenizing, "PART", 700)
    lines = [json.dumps({"prompt": "?" * (i % 5), "completion": f"{i} is {i * i}"}) for i in range(60)]
    (corpus / "05.jsonl").write_text("\n".join([*lines[:20], "{", "", *lines[20:], "[1]"]))
    return corpus


def made(corpus: Path, cache: Path, processes: int = 1) -> dict[str, Shard]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="skipped 2 of 62 lines of .*: first at line 21: it is no JSON")
        return shards(list_files(corpus), Bytes(), 0.3, cache, processes=processes)


def content(cache: Path) -> dict[str, bytes]:
    return {p.relative_to(cache).as_posix(): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


def in_a_process(call: Callable[[], object]) -> int:
    """The exit code of a process that makes the call, 7 where it raises OSError."""

    def run() -> None:
        try:
            call()
        except OSError:
            os._exit(7)

    process = FORK.Process(target=run)
    process.start()
    process.join()
    return int(process.exitcode)


def test_any_number_of_processes_and_size_of_parts_makes_the_same(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for processes in (1, 2, 5):
        made(mixed, tmp_path / str(processes), processes)
    monkeypatch.setattr(tokenizing, "PART", 1 << 24)
    made(mixed, tmp_path / "whole")
    wanted = content(tmp_path / "whole")
    assert [name.partition("/")[2] for name in wanted][:2] == ["held_out/given.npy", "held_out/starts.npy"]
    assert all(content(tmp_path / str(processes)) == wanted for processes in (1, 2, 5))


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_finished_before_a_kill_is_kept(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    made(mixed, tmp_path / "straight")
    write = Parts.write

    def killed_at_4(self: Parts, number: int) -> None:
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, number)

    monkeypatch.setattr(Parts, "write", killed_at_4)  # with two processes: one of them, then who tries it again
    assert in_a_process(lambda: made(mixed, tmp_path / "cache", processes)) == -signal.SIGKILL
    (work,) = (tmp_path / "cache").iterdir()
    there = sorted((work / "700").glob("*.npz"))
    assert len(there) >= 4
    there[1].write_bytes(there[1].read_bytes()[:-9])
    content_of_2 = there[2].read_bytes()
    there[2].write_bytes(content_of_2[:300] + bytes([content_of_2[300] ^ 1]) + content_of_2[301:])
    numbers = []

    def counted(self: Parts, number: int) -> None:
        numbers.append(number)
        write(self, number)

    monkeypatch.setattr(Parts, "write", counted)
    made(mixed, tmp_path / "cache")
    assert {1, 2, 4} <= set(numbers)
    assert not {int(file.stem) for file in there} - {1, 2} & set(numbers)
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


def test_what_a_process_cannot_read_is_said(mixed: Path, tmp_path: Path) -> None:
    (mixed / "07.txt").write_bytes(b"\xff" * 900)
    with pytest.raises(ValueError, match=r"07\.txt is no UTF-8 text"):
        made(mixed, tmp_path / "cache", 3)


@pytest.mark.parametrize("room", [600, 6000])
def test_a_full_disk_leaves_nothing_half_written(mixed: Path, tmp_path: Path, room: int) -> None:
    """The disk takes no file of more than so many bytes: parts, or what they are joined to."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        made(mixed, tmp_path / "cache")

    assert in_a_process(limited) == 7
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".parts.")
    assert all(Parts.get(parts_at(left, mixed), int(file.stem)) for file in left.rglob("*.npz"))
    assert not list(left.rglob("*.part"))
    made(mixed, tmp_path / "cache")
    made(mixed, tmp_path / "straight")
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


def parts_at(folder: Path, corpus: Path) -> Parts:
    return Parts.of(folder, list_files(corpus), Bytes(), 0.3, "text")


def test_two_runs_that_start_together_tokenise_once(mixed: Path, tmp_path: Path) -> None:
    both = [FORK.Process(target=made, args=(mixed, tmp_path / "cache")) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    made(mixed, tmp_path / "straight")
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


def test_a_corpus_of_many_parts_is_its_documents(mixed: Path, tmp_path: Path) -> None:
    found = made(mixed, tmp_path / "cache")
    texts = [bytes(part) for s in found.values() for part in np.split(s.tokens, s.starts[1:])]
    wanted = [f.read_bytes() for f in mixed.rglob("*.txt") if f.stat().st_size]
    wanted += [f"{'?' * (i % 5)}{i} is {i * i}".encode() for i in range(60)]
    assert sorted(texts) == sorted(wanted)
