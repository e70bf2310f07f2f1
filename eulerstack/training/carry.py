"""State that one row hands to the next: truncated backpropagation through documents longer than a row."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from ..data.batches import Batch
from ..layers.loss import Average
from ..layers.share import Share
from ..mixers.cached import CachedAttention
from ..model import Stack
from ..state import StackState


class Carry:
    """The state after each row of the last batch; none before the first."""

    def __init__(self) -> None:
        self.state: StackState | None = None
        self._kept: dict[str, Any] | None = None

    def losses(self, model: Stack, batch: Batch, average: Average, ranks: Share) -> tuple[Tensor, dict[str, Tensor]]:
        """Those of `Stack.losses_from` the state, which then is the one after these rows."""
        if self.state is None:
            self.state = self._begun(model, batch, ranks)
        loss, parts, self.state = model.losses_from(batch.tokens, batch.targets, self.state, batch.segments(), average)
        return loss, parts

    def saved(self, ranks: Share) -> dict[str, Any] | None:
        """The state of the rows of all ranks, on the CPU, as those of one; all must ask."""
        if self.state is None:
            return None
        mine: dict[str, Any] = {name: tensor.cpu() for name, tensor in self.state.tensors().items()}
        mine["bound"] = self.state.bound
        if ranks.of == 1:
            return mine
        every: list[dict[str, Any]] = [{} for _ in range(ranks.of)]
        dist.all_gather_object(every, mine, group=ranks.group)
        whole: dict[str, Any] = {name: torch.cat([one[name] for one in every]) for name in self.state.tensors()}
        return {**whole, "bound": max(one["bound"] for one in every)}

    def restore(self, kept: dict[str, Any] | None) -> None:
        """Go on from what was saved, with the next batch."""
        self.state, self._kept = None, kept

    def _begun(self, model: Stack, batch: Batch, ranks: Share) -> StackState:
        rows = batch.tokens.shape[0]
        state = model.init_state(rows, batch.reach)
        if self._kept is None:
            return state
        kept, self._kept = self._kept, None
        mine = slice(ranks.rank * rows, (ranks.rank + 1) * rows)
        with torch.no_grad():
            for name, tensor in state.tensors().items():
                tensor.copy_(kept[name][mine])
        return StackState(state.layers, state.length, state.reach, kept["bound"], state.max_tokens)


def check_carries(module: L.LightningModule, longest: int) -> None:
    """Raises ValueError for a stack that cannot carry its state through documents of up to `longest` tokens."""
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        raise ValueError("data.carry_state trains on one device or with strategy ddp, and not with fsdp2")
    trained: Any = module  # a StackModule, whose file imports this one
    model = trained.model
    assert isinstance(model, Stack)
    limit, hints = model.spec.model.max_seq_len, model.spec.training_hints
    if hints.checkpointing != "none":
        raise ValueError(
            f"data.carry_state and checkpointing = {hints.checkpointing} do not go together; "
            "set checkpointing to none, and data.seq_len to what fits the memory"
        )
    if trained.compiled:
        raise ValueError(
            "data.carry_state runs layers in their chunkwise form, which is not compiled; leave compile out"
        )
    if model.spec.head.mtp is not None:
        raise ValueError("data.carry_state trains no head that looks further ahead; give head.type: causal_lm")
    if any(isinstance(part, CachedAttention) and part.attn_drop for part in model.modules()):
        raise ValueError("data.carry_state drops no attention weights; set attn_drop to 0")
    model.check_keeps_state()
    if model.grows and longest > limit:
        raise ValueError(
            f"data.carry_state hands the state on to the end of a document, and the longest has {longest:,} tokens, "
            f"more than model.max_seq_len = {limit}: attention without a window, and Hyena, keep every token. "
            "Give attention a window, raise model.max_seq_len, or shorten the documents"
        )
