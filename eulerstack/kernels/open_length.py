"""Lengths that a program leaves open: torch.export with a dynamic time. No loop may go over their tokens or chunks."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

LONGEST = 1 << 20
"""Tokens of a program whose time has no largest value."""


def is_open(tokens: int | torch.SymInt) -> bool:
    """Whether the number is a program's, which is not known yet."""
    return isinstance(tokens, torch.SymInt)


def reaches(tokens: int | torch.SymInt) -> Iterator[int]:
    """1, 2, 4 ... below `tokens`, the steps of a prefix scan; of an open number, below the most that it may be."""
    most, reach = _largest(tokens) if isinstance(tokens, torch.SymInt) else tokens, 1
    while reach < most:
        yield reach
        reach *= 2


def _largest(tokens: torch.SymInt) -> int:
    bounds = tokens.node.shape_env.bound_sympy(tokens.node.expr)
    if bounds.upper.is_Integer:
        return int(bounds.upper)
    torch._check(tokens <= LONGEST)
    return LONGEST


def delay(x: Tensor, by: int, nothing: float = 0.0) -> Tensor:
    """x [B, T, ...] `by` tokens later, `nothing` in front of it."""
    rest, tokens = (0, 0) * (x.dim() - 2), x.shape[1]
    if not is_open(tokens):
        return pad(x[:, : max(tokens - by, 0)], (*rest, min(by, tokens), 0), value=nothing)
    place = torch.arange(tokens, device=x.device) - by
    there = (place >= 0).reshape(-1, *[1] * (x.dim() - 2))
    return torch.where(there, x[:, place.clamp(min=0)], nothing)
