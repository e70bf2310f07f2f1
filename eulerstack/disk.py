"""Files that are on the disk whole, or not at all."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def to_disk(place: Path) -> None:
    """Returns when the file's bytes, or the directory's names, would outlive a loss of power."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file beside its place and move it there when all of it is on the disk: never half of it, never none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.parent / f".{file.name}.part"
    try:
        with part.open("wb") as data:
            write(data)
            data.flush()
            os.fsync(data.fileno())
        os.replace(part, file)
        to_disk(file.parent)
    finally:
        part.unlink(missing_ok=True)


def put_folder(work: Path, place: Path) -> None:
    """Move a folder to where another one may be, when all of it is on the disk.

    Where one is, that takes two steps: `recover` puts it back if the process is killed between them.
    """
    for file in (*work.iterdir(), work):
        to_disk(file)
    old = _aside(place)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    try:
        os.replace(work, place)
    except OSError:
        recover(place)
        raise
    to_disk(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(place: Path) -> None:
    """Put back what was moved aside for a folder that never came."""
    if not place.exists() and _aside(place).exists():
        os.replace(_aside(place), place)


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While no other process is in here with the same folder; who waits goes on when the other ends, killed or not."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
