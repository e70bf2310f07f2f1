"""GPUs that people train on: memory, and the dense matmul rate in 16 bits that their makers' data sheets give."""

import difflib
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Device:
    """bytes of memory; flops a second in bfloat16 (float16 where it has none), without sparsity."""

    memory: int
    flops: float


DEVICES = {
    "a100": Device(80 * GB, 312e12),
    "a100-40": Device(40 * GB, 312e12),
    "h100": Device(80 * GB, 989e12),
    "h200": Device(141 * GB, 989e12),
    "b200": Device(180 * GB, 2250e12),
    "a10": Device(24 * GB, 125e12),
    "l4": Device(24 * GB, 121e12),
    "l40s": Device(48 * GB, 362e12),
    "rtx3090": Device(24 * GB, 71e12),
    "rtx4090": Device(24 * GB, 165e12),
    "t4": Device(16 * GB, 65e12),
    "v100": Device(32 * GB, 125e12),
}
"""By the name that `estimate --device` takes. SXM versions where there are several."""

USABLE = 0.92
"""Share of the memory that tensors can have: the rest is the driver's, the libraries' and fragments."""


def find(name: str) -> Device:
    """Raises ValueError for a name that is not in the table."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    near = difflib.get_close_matches(name.lower(), DEVICES, 1)
    known = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(DEVICES)}"
    raise ValueError(f"--device {name!r} is not in the table of devices; {known}")
