"""Files that are on the disk whole, or not at all."""

import fcntl
import os
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
