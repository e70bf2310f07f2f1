"""Paths as users write them."""

import os
from pathlib import Path


def expand_home(given: str | os.PathLike[str]) -> Path:
    """The path, its `~` (or `~NAME`, where there is such a user) being a home folder, as in a shell; `./~` is not.

    Raises ValueError where nobody knows the user's own: a folder called `~` is not what was meant.
    """
    path = os.path.expanduser(given)
    if path.split(os.sep)[0] == "~":
        raise ValueError(f"{os.fspath(given)!r}: ~ is no folder, for HOME is not set here; write the whole path")
    found = Path(path)
    return found.absolute() if found.parts[:1] == ("~",) else found  # it says ./~ no more, and is expanded only once
