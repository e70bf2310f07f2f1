"""Mixers side by side, as in Hymba (Dong et al. 2024, arXiv 2411.13676) and Falcon-H1 (2025, arXiv 2507.22448)."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.precision import wide
from ..layers.ffn import init_linear
from ..layers.linear import project
from ..layers.share import Share, Split
from ..segments import Segments
from ..state import BranchedState, LayerState
from .base import Mixer


class Branched(Mixer[BranchedState]):
    """y = sum of y_i, or with a gate, sum of softmax(x W)_i y_i: weights [B, T, n] of a token for its n branches."""

    def __init__(self, branches: list[Mixer[LayerState]], width: int, gated: bool) -> None:
        super().__init__()
        self.width = width
        self.branches = nn.ModuleList(branches)
        self.gate_proj = nn.Linear(width, len(branches), bias=False) if gated else None
        self.chunked = all(branch.chunked for branch in branches)
        self.choices = tuple(choice for branch in branches for choice in branch.choices)

    def __iter__(self) -> Iterator[Mixer[LayerState]]:
        return iter(cast("list[Mixer[LayerState]]", self.branches))  # torch.export(strict) reads no generic

    @property
    def grows(self) -> bool:  # type: ignore[override]
        return any(branch.grows for branch in self)

    def _summed(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        if self.gate_proj is None:
            return torch.stack(outputs).sum(0)
        weights: Tensor = project(x, self.gate_proj).to(wide(x.dtype)).softmax(-1).to(x.dtype)
        return (torch.stack(outputs, -1) @ weights[..., None])[..., 0]

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        return self._summed(x, [branch.parallel(x, segments) for branch in self])

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """Each branch in the form that its own spec names."""
        return self._summed(x, [branch(x, segments) for branch in self])

    def chunkwise(
        self, x: Tensor, state: BranchedState, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, BranchedState]:
        pairs = zip(self, state.branches, strict=True)
        return self._joined(x, [branch.chunkwise(x, own, segments, chunk_size=chunk_size) for branch, own in pairs])

    def recurrent(
        self, x: Tensor, state: BranchedState, segments: Segments | None = None
    ) -> tuple[Tensor, BranchedState]:
        pairs = zip(self, state.branches, strict=True)
        return self._joined(x, [branch.recurrent(x, own, segments) for branch, own in pairs])

    def _joined(self, x: Tensor, results: list[tuple[Tensor, LayerState]]) -> tuple[Tensor, BranchedState]:
        outputs, states = zip(*results, strict=True)
        return self._summed(x, list(outputs)), BranchedState(states)

    def split(self, share: Share) -> Split:
        """Each branch by its own plan: a weighted sum of shares is the share of the weighted sum."""
        self.share = share
        plans = (branch.split(share).items() for branch in self)
        return {f"branches.{i}.{name}": dim for i, plan in enumerate(plans) for name, dim in plan}

    def memo(self) -> object:
        return tuple(branch.memo() for branch in self)

    def dynamics(self, x: Tensor, segments: Segments) -> dict[str, Tensor]:
        """Each branch's, with its number behind the names."""
        found = (branch.dynamics(x, segments).items() for branch in self)
        return {f"{name}.{i}": values for i, items in enumerate(found) for name, values in items}

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> BranchedState:
        return BranchedState(tuple(b.init_state(batch, max_tokens, device, dtype, rollback=rollback) for b in self))

    def flops(self, tokens: int) -> int:
        """The branches', and the gate's with the weighted sum."""
        gate = 0 if self.gate_proj is None else 4 * tokens * self.width * len(self.branches)
        return gate + sum(branch.flops(tokens) for branch in self)

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        """The branches' outputs are scaled so that their sum is as large as one mixer's."""
        share = len(self.branches) ** (-0.5 if self.gate_proj is None else 0.5)
        for branch in self:
            branch.reset_parameters(out_scale * share)
        if self.gate_proj is not None:
            init_linear(self.gate_proj)
