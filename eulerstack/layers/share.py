"""One rank's share of a layer that several hold together: tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053).

Each rank computes some of the heads, or of the channels, from the whole input; the outputs are summed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Share:
    """The share of rank `rank` among `of`. A layer that is not split is the only share of one."""

    rank: int = 0
    of: int = 1
    group: Any = None  # the ranks' process group

    def enter(self, x: Tensor) -> Tensor:
        """What all ranks hold whole and each uses for its share: its gradients are summed."""
        return x if self.of == 1 else _summed(x, self.group, False, True)

    def leave(self, y: Tensor) -> Tensor:
        """The sum of the ranks' outputs, which all hold whole."""
        return y if self.of == 1 else _summed(y, self.group, True, False)

    def total(self, t: Tensor) -> Tensor:
        """The sum of what each rank has, to be used for its share: `leave`, and `enter` again."""
        return t if self.of == 1 else _summed(t, self.group, True, True)

    def once(self, t: Tensor) -> Tensor:
        """What each rank computes alike between `enter` and `leave`, for a loss that all of them have: counted once."""
        if self.of == 1:
            return t
        scaled: Tensor = _Scaled.apply(t, 1 / self.of)
        return scaled

    def part(self, t: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of a tensor of all heads, or channels."""
        return t if self.of == 1 else t.chunk(self.of, dim)[self.rank]

    def every(self, t: Tensor) -> Tensor:
        """The ranks' tensors [N] end to end; no gradient."""
        if self.of == 1:
            return t
        parts = [torch.empty_like(t) for _ in range(self.of)]
        dist.all_gather(parts, t.contiguous(), group=self.group)
        return torch.cat(parts)

    def divided(self, count: int, what: str) -> int:
        """A rank's number of `count` heads, or channels. Raises ValueError where they do not divide."""
        if count % self.of:
            raise ValueError(
                f"{what} = {count} cannot be split over {self.of} ranks; give a tensor_parallel that divides it"
            )
        return count // self.of


WHOLE = Share()

Split = dict[str, int]
"""How a layer is split: the dimension of each parameter of which a rank holds a part. It holds the others whole."""


def columns(names: Iterable[str]) -> Split:
    """Split by their outputs."""
    return dict.fromkeys(names, 0)


def _summed(t: Tensor, group: Any, forward: bool, backward: bool) -> Tensor:
    total: Tensor = _Sum.apply(t, group, forward, backward)
    return total


class _Sum(torch.autograd.Function):
    """A sum over ranks, of the tensor, of its gradient, or of both."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any, forward: bool, backward: bool) -> Tensor:
        ctx.group, ctx.backward = group, backward
        return _all_reduced(t, group) if forward else t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return _all_reduced(grad, ctx.group) if ctx.backward else grad, None, None, None


class _Scaled(torch.autograd.Function):
    """The tensor, with its gradient times a number."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None


def _all_reduced(t: Tensor, group: Any) -> Tensor:
    t = t.contiguous().clone()
    dist.all_reduce(t, group=group)
    return t
