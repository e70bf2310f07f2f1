"""GPUs that people train on: memory as `nvidia-smi` shows it, and the data sheet's dense matmul rate in 16 bits."""

import difflib
import re
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Device:
    """bytes of memory; flops a second in bfloat16 (float16 where it has none), without sparsity."""

    memory: int
    flops: float


DEVICES = {
    "a100": Device(81_920 * MIB, 312e12),
    "a100-80": Device(81_920 * MIB, 312e12),
    "a100-40": Device(40_960 * MIB, 312e12),
    "h100": Device(81_559 * MIB, 989e12),
    "h200": Device(143_771 * MIB, 989e12),
    "b200": Device(183_359 * MIB, 2250e12),
    "a10": Device(23_028 * MIB, 125e12),
    "l4": Device(23_034 * MIB, 121e12),
    "l40s": Device(46_068 * MIB, 362e12),
    "rtx3090": Device(24_576 * MIB, 71e12),
    "rtx4090": Device(24_564 * MIB, 165e12),
    "t4": Device(15_360 * MIB, 65e12),
    "v100": Device(32_768 * MIB, 125e12),
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


DRIVER_NAMES = {
    "a100": r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe",
    "h100": r"H100 80GB HBM3",
    "h200": r"H200",
    "b200": r"B200",
    "a10": r"A10",
    "l4": r"L4",
    "l40s": r"L40S",
    "rtx3090": r"GeForce RTX 3090",
    "rtx4090": r"GeForce RTX 4090",
    "t4": r"T4",
    "v100": r"V100-SXM[23]-\d+GB",
}
"""What the driver calls a device of the table, after the maker's name; slower versions and shares of one are not."""


def recognise(name: str) -> Device | None:
    """The device that the driver calls `name`, as torch.cuda.get_device_name does; None for one that is not known."""
    bare = re.sub(r"^(NVIDIA |Tesla )+", "", name)
    return next((DEVICES[key] for key, pattern in DRIVER_NAMES.items() if re.fullmatch(pattern, bare)), None)
