"""doctor: what is installed here, and which provider can serve which operation, or why not."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..kernels.provider import Target
from ..kernels.select import survey

PACKAGES = ("torch", "lightning", "numpy", "pydantic", "numba", "triton")


def doctor() -> None:
    """Versions, the device, and a table of providers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    system = f"{platform.system()} {platform.machine()}"
    print(f"eulerstack {version('eulerstack')}, Python {platform.python_version()}, {system}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    print(f"device: {_device()}\n")
    table = Table(box=None, pad_edge=False)
    for name in ("operation", "provider", f"serves on {device}", "why, or why not"):
        table.add_column(name, overflow="fold")
    for answer in survey(Target(device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)):
        serves = "auto" if answer.chosen else "yes" if answer.refusal is None else "no"
        reason = answer.refusal or ("" if answer.chosen else f"by name: kernels={answer.provider!r}")
        table.add_row(answer.operation, answer.provider, serves, escape(reason))
    Console().print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads; no CUDA device"
