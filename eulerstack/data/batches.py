"""Rows to batches, by a loader that knows how far it was read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..segments import IGNORED, Segments
from .order import Order
from .rows import Item, Streamed, Together


@dataclass
class Batch:
    """tokens, targets [B, T] int64 (-100: no target). document [B, T], None where each row is one document.

    reach: tokens of the longest document, where rows continue those of the batch before; 0 where they do not.
    carries: [B] bool, which of them do, None for all.
    """

    tokens: Tensor
    targets: Tensor
    document: Tensor | None
    bytes_per_token: float
    reach: int = 0
    carries: Tensor | None = None

    def segments(self) -> Segments | None:
        if self.document is None and self.carries is None:
            return None
        return Segments(document=self.document, carries=self.carries)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """A batch with `change` applied to every tensor."""
        document, carries = (None if t is None else change(t) for t in (self.document, self.carries))
        return replace(
            self, tokens=change(self.tokens), targets=change(self.targets), document=document, carries=carries
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self.map(Tensor.pin_memory)


class Batches:
    """A sized loader that knows how far it was read; Lightning saves and restores it with the run.

    It holds a DataLoader and is none: into one, Lightning puts a sampler of its own wherever there are several devices.

    read: what a run that resumes must read again, by the names of data.*. reach: as in `Batch`.
    """

    def __init__(
        self,
        rows: Together | Streamed,
        order: Order,
        seq_len: int,
        bytes_per_token: float,
        workers: int,
        read: dict[str, Any],
        reach: int = 0,
    ) -> None:
        self.rows, self.order, self.read = rows, order, read
        self.loader: DataLoader[Item] = DataLoader(
            rows,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=lambda items: collate(items, seq_len, bytes_per_token, reach),
            multiprocessing_context="fork" if workers else None,
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        if self.order.seed is None:
            self.order.taken = 0
        for batch in self.loader:
            self.order.taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.order.seed, "taken": self.order.taken, **self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the run that was stopped read other batches."""
        for key in sorted({*state, *self.read} - {"seed", "taken"}):
            was, now = state.get(key), self.read.get(key)
            if was != now:
                raise ValueError(
                    f"the run to resume had data.{key} = {was}, and this one has {now}; "
                    "resume with the same data, or start a new run from its checkpoint/"
                )
        self.order.seed, self.order.taken = state["seed"], state["taken"]


def collate(items: list[Item], seq_len: int, bytes_per_token: float, reach: int = 0) -> Batch:
    """Rows of T tokens; short rows are filled with targets that do not count. Targets stay inside a document.

    A prompt's tokens are no targets.
    """
    tokens = torch.zeros(len(items), seq_len + 1, dtype=torch.int64)
    document = torch.full_like(tokens, -1)
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (ids, owner, may, _) in enumerate(items):
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        document[row, : len(ids)] = torch.from_numpy(owner)
        counts[row, : len(ids)] = torch.from_numpy(may)
    inside = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    targets = torch.where(inside & counts[:, 1:], tokens[:, 1:], IGNORED)
    whole = bool((document[:, :-1] == document[:, :1]).all())
    carries = torch.tensor([item.carries for item in items])
    return Batch(
        tokens[:, :-1],
        targets,
        None if whole else document[:, :-1].contiguous(),
        bytes_per_token,
        reach,
        None if not reach or bool(carries.all()) else carries,
    )
