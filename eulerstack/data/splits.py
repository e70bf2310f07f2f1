"""What is held out: chosen by the hash of a document's name, so that adding documents moves no other."""

import hashlib

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "held_out")


def is_held(name: str, held_out: float) -> bool:
    """Whether the document of this name is held out, with the share `held_out` of all."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < held_out * 2**32


def with_both(held: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """held [documents], with the last of two or more held out where none was, and the first not where all were."""
    held = held.copy()
    if len(held) > 1 and not held.any():
        held[-1] = True
    if len(held) > 1 and held.all():
        held[0] = False
    return held
