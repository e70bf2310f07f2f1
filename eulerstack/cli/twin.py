"""estimate --match: the FFN width at which a stack has as many parameters as another."""

from typing import NamedTuple

from ..costs import estimate as count
from ..spec import load

WIDEST = 64.0
"""The largest mlp_ratio that the language allows."""


class Twin(NamedTuple):
    """The mlp_ratio at which a stack of `before` parameters has `parameters`, the nearest to the `goal`."""

    goal: int
    before: int
    parameters: int
    mlp_ratio: float

    def __str__(self) -> str:
        return (
            f"{self.goal:,} parameters to match; without a change the stack has {self.before:,}.\n"
            f"--set model.mlp_ratio={self.mlp_ratio!r} gives it {self.parameters:,} "
            f"({self.parameters / self.goal - 1:+.2%})."
        )


def match(file: str, settings: tuple[str, ...], wanted: str) -> Twin:
    """The setting that gives `file` the parameters of another, `parameters=FILE`: FFN widths in steps of 8 channels.

    Raises ValueError where no width does.
    """
    what, _, other = wanted.partition("=")
    if what != "parameters" or not other:
        raise ValueError(f"--match {wanted!r}: write --match parameters=FILE")
    goal, spec = count(load(other)).parameters, load(file, settings)
    width = spec.model.d_model

    def parameters(channels: int) -> int:
        return count(load(file, [*settings, f"model.mlp_ratio={channels / width!r}"])).parameters

    low, high = 8, int(WIDEST * width) // 8 * 8
    fewest, most = parameters(low), parameters(high)
    if not fewest <= goal <= most:
        raise ValueError(
            f"--match: with FFNs of {low} to {high} channels {spec.model.name} has {fewest:,} to {most:,} parameters, "
            f"and {other} has {goal:,}; change model.d_model or the number of layers first"
        )
    while high - low > 8:
        middle = (low + high) // 16 * 8
        low, high = (middle, high) if parameters(middle) < goal else (low, middle)
    best = min((low, high), key=lambda channels: abs(parameters(channels) - goal))
    return Twin(goal, count(spec).parameters, parameters(best), best / width)
