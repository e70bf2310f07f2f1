"""Which provider serves an operation: chosen once, when a mixer is built, by name or `auto`, with the reason."""

from importlib import import_module
from typing import Any, NamedTuple

from .provider import Provider, Target

PROVIDERS: dict[str, tuple[str, ...]] = {
    "attention": ("torch",),
    "conv": ("numba", "torch"),
    "long_conv": ("torch",),
    "wkv": ("torch",),
    "retention": ("numba", "torch", "fla"),
    "selective_scan": ("numba", "torch"),
    "ssd": ("numba", "torch", "fla"),
}
"""Operation -> its providers in the order that `auto` tries them; each is a file, kernels/<operation>/<provider>.py.

What stands behind `torch`, which serves everything, is taken only by name: it has not been measured on a GPU yet.
"""


class Choice(NamedTuple):
    """The kernels that serve an operation, and why they and no others."""

    operation: str
    provider: str
    kernels: Any
    reason: str


def select(operation: str, target: Target) -> Choice:
    """The provider asked for, or with `auto` the fastest that can serve.

    A name that has no kernels for this operation leaves it to `auto`. Raises ValueError where the provider asked for
    cannot serve.
    """
    names = PROVIDERS[operation]
    if target.kernels in names:
        return _asked_for(operation, target)
    refusals: list[str] = []
    for name in names:
        reason = _why_not(operation, name, target)
        if reason is None:
            return Choice(operation, name, _load(operation, name).kernels, "; ".join(refusals) or "the fastest here")
        refusals.append(f"{name}: {reason}")
    raise ValueError(f"no provider can serve {operation}: {'; '.join(refusals)}")


def check_name(kernels: str) -> None:
    """Raises ValueError for a name that is no provider's."""
    known = sorted({name for names in PROVIDERS.values() for name in names})
    if kernels not in ("auto", *known):
        raise ValueError(f"kernels={kernels!r}: there is no such provider; use one of {', '.join(['auto', *known])}")


def _asked_for(operation: str, target: Target) -> Choice:
    name = target.kernels
    reason = _why_not(operation, name, target)
    if reason is not None:
        raise ValueError(f"kernels={name!r} cannot serve {operation}: {reason}; use kernels='auto'")
    return Choice(operation, name, _load(operation, name).kernels, "asked for")


def _why_not(operation: str, name: str, target: Target) -> str | None:
    try:
        return _load(operation, name).refuses(target)
    except ModuleNotFoundError as error:
        return f"{(error.name or '').partition('.')[0]} is not installed"
    except ImportError as error:
        return f"does not import ({error})"


def _load(operation: str, name: str) -> Provider:
    provider: Provider = import_module(f".{operation}.{name}", __package__).PROVIDER
    return provider
