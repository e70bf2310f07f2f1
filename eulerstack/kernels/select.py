"""Which provider serves an operation: chosen once, when a mixer is built, by name or `auto`, with the reason."""

from importlib import import_module
from typing import Any, NamedTuple

from .provider import Provider, Target

PROVIDERS: dict[str, tuple[str, ...]] = {
    "attention": ("numba", "triton", "torch", "flash_attn"),
    "conv": ("numba", "torch", "causal_conv1d"),
    "linear": ("numba", "onednn", "torch"),
    "long_conv": ("torch",),
    "norm": ("numba", "torch"),
    "wkv": ("torch",),
    "retention": ("numba", "triton", "torch", "fla"),
    "selective_scan": ("numba", "torch", "mamba_ssm"),
    "ssd": ("numba", "torch", "fla", "mamba_ssm"),
}
"""Operation -> its providers in the order that `auto` tries them; each is a file, kernels/<operation>/<provider>.py.

What stands behind `torch`, which serves everything, is taken only by name.
"""

PACKAGES = {
    "fla": "flash-linear-attention",
    "mamba_ssm": "mamba-ssm",
    "selective_scan_cuda": "--no-build-isolation mamba-ssm, with MAMBA_KEEP_CUDA_BUILD=TRUE",
    "causal_conv1d": "causal-conv1d",
    "causal_conv1d_cuda": "causal-conv1d",
    "flash_attn": "flash-attn",
    "flash_attn_2_cuda": "flash-attn",
}
"""What is installed for what is imported."""


class Choice(NamedTuple):
    """The kernels that serve an operation, and why they and no others."""

    operation: str
    provider: str
    kernels: Any
    reason: str


def select(operation: str, target: Target, **needs: Any) -> Choice:
    """The provider asked for, or with `auto` the fastest that can serve. `needs`: what the mixer will ask of it.

    A name that has no kernels for this operation leaves it to `auto`. Raises ValueError where the provider asked for
    cannot serve.
    """
    names = PROVIDERS[operation]
    if target.kernels in names:
        return _asked_for(operation, target, needs)
    refusals: list[str] = []
    for name in names:
        reason = _why_not(operation, name, target, needs)
        if reason is None:
            return Choice(operation, name, _load(operation, name).kernels, "; ".join(refusals) or "the fastest here")
        refusals.append(f"{name}: {reason}")
    raise ValueError(f"no provider can serve {operation}: {'; '.join(refusals)}")


class Answer(NamedTuple):
    """Whether a provider can serve an operation (no refusal), and whether it is the one that `auto` takes."""

    operation: str
    provider: str
    refusal: str | None
    chosen: bool


def survey(target: Target) -> list[Answer]:
    """What every provider of every operation answers; a mixer may need more of it than is asked here."""
    answers = []
    for operation, names in PROVIDERS.items():
        chosen = select(operation, target).provider
        answers += [Answer(operation, name, _why_not(operation, name, target, {}), name == chosen) for name in names]
    return answers


def check_name(kernels: str) -> None:
    """Raises ValueError for a name that is no provider's."""
    known = sorted({name for names in PROVIDERS.values() for name in names})
    if kernels not in ("auto", *known):
        raise ValueError(f"kernels={kernels!r}: there is no such provider; use one of {', '.join(['auto', *known])}")


def _asked_for(operation: str, target: Target, needs: dict[str, Any]) -> Choice:
    name = target.kernels
    reason = _why_not(operation, name, target, needs)
    if reason is not None:
        raise ValueError(f"kernels={name!r} cannot serve {operation}: {reason}; use kernels='auto'")
    return Choice(operation, name, _load(operation, name).kernels, "asked for")


def _why_not(operation: str, name: str, target: Target, needs: dict[str, Any]) -> str | None:
    try:
        return _load(operation, name).refuses(target, **needs)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        return f"{missing} is not installed (pip install {PACKAGES.get(missing, missing)})"
    except ImportError as error:
        return f"does not import ({error})"


def _load(operation: str, name: str) -> Provider:
    provider: Provider = import_module(f".{operation}.{name}", __package__).PROVIDER
    return provider
