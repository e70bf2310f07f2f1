"""The files below a folder: none is passed over in silence, and each is read once."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from .names import shown


def files_below(root: Path, pattern: str, skip: set[str]) -> list[Path]:
    """The files that match the pattern at any depth, in sorted order, without hidden names and those of `skip`.

    Links to folders outside are followed; those to folders in `root` or around it hold nothing new. Raises ValueError
    for a folder that cannot be read and for a link to nothing.
    """
    words = ("**", *Path(pattern).parts)
    found = (path for path in _walk(root, skip, root.resolve(), set()) if _match(path.relative_to(root).parts, words))
    return sorted(map(_checked, found))


def _walk(folder: Path, skip: set[str], root: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """root: links resolved. seen: the devices and inodes of the folders that were read."""
    for entry in _entries(folder, seen):
        if entry.name in skip or entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if not path.is_dir():  # the entry's own is_dir raises for a link to itself
            yield path
        elif not entry.is_symlink() or _leads_out(path, root):
            yield from _walk(path, skip, root, seen)


def _entries(folder: Path, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """In sorted order; none of a folder that was read before."""
    try:
        here = folder.stat()
        if (here.st_dev, here.st_ino) in seen:
            return []
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{shown(folder)} cannot be read: {error.strerror}; make it readable, or remove it") from None


def _leads_out(link: Path, root: Path) -> bool:
    """Whether a link leads to what is not read anyhow: outside of the root, or hidden in it."""
    target = link.resolve()
    if root in target.parents:
        return any(part.startswith(".") for part in target.relative_to(root).parts)
    return target != root and target not in root.parents


def _checked(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_symlink():
        raise ValueError(f"{shown(path)} is a link to nothing, or to itself: remove it, or copy the file there")
    if not path.exists():
        raise ValueError(f"{shown(path)} was removed while data.path was listed: start again")
    raise ValueError(f"{shown(path)} is no file with text but a pipe, a socket or a device: remove it from data.path")


def _match(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """As in pathlib: ** stands for any folders, also none."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_match(parts[begin:], pattern[1:]) for begin in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _match(parts[1:], pattern[1:])
