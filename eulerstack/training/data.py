"""TextData: any text as batches of tokens, in an order that can be resumed to the bit."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..model import IGNORED
from ..segments import Segments
from ..spec import ByteTokenizer, HFTokenizer
from ..tokens import check_fits, tokenizer_of
from .corpus import Shard, list_files, shards, standard_library

Item = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass
class Batch:
    """tokens, targets [B, T] int64 (-100: no target). document [B, T], None where each row is one document."""

    tokens: Tensor
    targets: Tensor
    document: Tensor | None
    bytes_per_token: float

    def segments(self) -> Segments | None:
        return None if self.document is None else Segments(document=self.document)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        moved = (
            None if t is None else t.to(device, non_blocking=non_blocking)
            for t in (self.tokens, self.targets, self.document)
        )
        tokens, targets, document = moved
        assert tokens is not None
        assert targets is not None
        return Batch(tokens, targets, document, self.bytes_per_token)

    def pin_memory(self) -> "Batch":
        document = None if self.document is None else self.document.pin_memory()
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory(), document, self.bytes_per_token)


class Windows(Dataset[Item]):
    """A shard cut into windows of T + 1 tokens, each sharing one token with the next: every token is a target once.

    Item i is (tokens [T + 1], documents [T + 1]); the last window may be short.
    """

    def __init__(self, shard: Shard, seq_len: int) -> None:
        self.shard, self.seq_len = shard, seq_len

    def __len__(self) -> int:
        return max(1, math.ceil((len(self.shard.tokens) - 1) / self.seq_len))

    def __getitem__(self, index: int) -> Item:
        start = index * self.seq_len
        tokens = np.asarray(self.shard.tokens[start : start + self.seq_len + 1]).astype(np.int64)
        return tokens, self.shard.document_at(np.arange(start, start + len(tokens)))


class Order(Sampler[list[int]]):
    """Batches of window numbers: a fresh permutation each epoch, a function of (seed, epoch) alone."""

    def __init__(self, windows: int, batch_size: int, seed: int | None) -> None:
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.epoch, self.done = 0, 0

    def __len__(self) -> int:
        """Whole batches when shuffled; all windows in order when not."""
        if self.seed is None:
            return math.ceil(self.windows / self.batch_size)
        return max(1, self.windows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.windows)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.windows)
        for batch in range(self.done, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


class Batches(DataLoader[Any]):
    """A sized loader that knows how far it was read; Lightning saves and restores it with the run."""

    def __init__(self, shard: Shard, seq_len: int, batch_size: int, seed: int | None, workers: int) -> None:
        windows = Windows(shard, seq_len)
        self.order = Order(len(windows), batch_size, seed)
        ratio = shard.bytes_per_token
        super().__init__(
            windows,
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=lambda items: collate(items, seq_len, ratio),
            persistent_workers=False,
            multiprocessing_context="fork" if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.order.seed is None:  # held-out text is read from its start each time, also after a partial reading
            self.order.done = 0
        for batch in super().__iter__():
            self.order.done += 1
            yield batch
        self.order.epoch, self.order.done = self.order.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.order.seed, "epoch": self.order.epoch, "done": self.order.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.seed, self.order.epoch, self.order.done = state["seed"], state["epoch"], state["done"]


def collate(items: list[Item], seq_len: int, bytes_per_token: float) -> Batch:
    """Rows of T tokens; short rows are filled with targets that do not count. Targets stay inside a document."""
    tokens = torch.zeros(len(items), seq_len + 1, dtype=torch.int64)
    document = torch.full_like(tokens, -1)
    for row, (ids, owner) in enumerate(items):
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        document[row, : len(ids)] = torch.from_numpy(owner)
    inside = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    targets = torch.where(inside, tokens[:, 1:], IGNORED)
    whole = bool((document[:, :-1] == document[:, :1]).all())
    return Batch(tokens[:, :-1], targets, None if whole else document[:, :-1].contiguous(), bytes_per_token)


class TextData(L.LightningDataModule):
    """Text for `fit` and `test`: windows of seq_len tokens, each token seeing only its own file.

    Args:
        path: a folder or a file of text; by default Python's own standard-library sources on this machine.
        pattern: which files of the folder to read.
        tokenizer: a tokenizer.json or its folder; by default what the stack's tokenizer_contract says.
        seq_len: tokens in a row.
        batch_size: rows in a batch.
        held_out: share of the files kept for validation and test, chosen by the hash of their names.
        seed: of the shuffling; by default what torch was seeded with.
        workers: processes that load batches.
        cache_dir: where token shards are kept; by default the user's cache folder.
    """

    def __init__(
        self,
        path: str | None = None,
        pattern: str = "*",
        tokenizer: str | None = None,
        seq_len: int = 512,
        batch_size: int = 8,
        held_out: float = 0.02,
        seed: int | None = None,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        _check_range("seq_len", seq_len, 1, 1 << 24)
        _check_range("batch_size", batch_size, 1, 1 << 20)
        _check_range("workers", workers, 0, 1024)
        if not 0 < held_out < 1:
            raise ValueError(f"data.held_out = {held_out} must lie between 0 and 1")
        self.path, self.pattern, self.tokenizer = path, pattern, tokenizer
        self.seq_len, self.batch_size, self.held_out = seq_len, batch_size, held_out
        self.seed, self.workers = seed, workers
        self.cache = Path(cache_dir) if cache_dir else _user_cache()
        self.shards: dict[str, Shard] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.shards:
            return
        contract = self._contract()
        tokenizer = tokenizer_of(contract, self._folder())
        model = getattr(self.trainer, "lightning_module", None)
        if model is not None:
            check_fits(tokenizer, model.spec.model.vocab_size)
        files = standard_library() if self.path is None else list_files(Path(self.path), self.pattern)
        self.shards = shards(files, tokenizer, self.held_out, self.cache)

    def _contract(self) -> ByteTokenizer | HFTokenizer:
        if self.tokenizer is not None:
            return HFTokenizer(type="hf", pretrained=self.tokenizer)
        model = getattr(self.trainer, "lightning_module", None)
        return ByteTokenizer(type="byte") if model is None else model.spec.tokenizer_contract

    def _folder(self) -> Path | None:
        """A checkpoint's own tokenizer, unless another is asked for."""
        model = getattr(self.trainer, "lightning_module", None)
        return None if self.tokenizer is not None or model is None else model.weights

    def train_dataloader(self) -> Batches:
        seed = torch.initial_seed() % 2**32 if self.seed is None else self.seed
        return Batches(self.shards["train"], self.seq_len, self.batch_size, seed, self.workers)

    def val_dataloader(self) -> Batches:
        return Batches(self.shards["held_out"], self.seq_len, self.batch_size, None, self.workers)

    def test_dataloader(self) -> Batches:
        return self.val_dataloader()


def _check_range(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"data.{key} = {value} must lie between {low} and {high}")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eulerstack"
