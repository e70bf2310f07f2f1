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

from ..segments import IGNORED, Segments
from ..spec import ByteTokenizer, HFTokenizer
from ..tokens import Tokenizer, check_fits, tokenizer_of
from .corpus import Shard, list_files, shards, standard_library
from .packing import first_fit, pieces

Item = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]


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

    Item i is (tokens [T + 1], documents [T + 1], may be a target [T + 1]); the last window may be short.
    """

    def __init__(self, shard: Shard, seq_len: int) -> None:
        self.shard, self.seq_len = shard, seq_len

    def __len__(self) -> int:
        return max(1, math.ceil((len(self.shard.tokens) - 1) / self.seq_len))

    def __getitem__(self, index: int) -> Item:
        start = index * self.seq_len
        return _item(self.shard, np.arange(start, min(start + self.seq_len + 1, len(self.shard.tokens))))


class Rows(Dataset[Item]):
    """A shard's whole documents placed first-fit into rows of up to T + 1 tokens; longer documents are cut.

    Which documents share a row depends on the shard and T only. Items are as those of `Windows`.
    """

    def __init__(self, shard: Shard, seq_len: int) -> None:
        self.shard = shard
        begin, end = pieces(shard.starts, len(shard.tokens), seq_len)
        row = first_fit(end - begin, seq_len + 1)
        order = np.argsort(row, kind="stable")
        self.begin, self.end = begin[order], end[order]
        self.first = np.searchsorted(row[order], np.arange(row.max() + 2))

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> Item:
        here = slice(self.first[index], self.first[index + 1])
        return _item(self.shard, np.concatenate([*map(np.arange, self.begin[here], self.end[here])]))


def _item(shard: Shard, index: npt.NDArray[np.int64]) -> Item:
    """The tokens at these places of a shard."""
    return np.asarray(shard.tokens[index]).astype(np.int64), shard.document_at(index), shard.counts_at(index)


PACKINGS: dict[str, type[Windows] | type[Rows]] = {"cut": Windows, "packed": Rows}


class Order(Sampler[list[int]]):
    """Batches of window numbers: a fresh permutation each epoch, a function of (seed, epoch) alone.

    Each iteration is len(self) batches and goes on where the last one stopped, so that a limited epoch, a resumed one
    and one that ran to its end leave the same order behind. Without a seed: all windows in order, from the first.
    """

    def __init__(self, windows: int, batch_size: int, seed: int | None) -> None:
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.taken = 0
        self._drawn: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        """Whole batches when shuffled; the last may be short when not."""
        whole = self.windows / self.batch_size
        return math.ceil(whole) if self.seed is None else max(1, int(whole))

    def __iter__(self) -> Iterator[list[int]]:
        for at in range(self.taken, self.taken + len(self)):
            epoch, batch = divmod(at, len(self))
            order = self._permutation(epoch)
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if self.seed is None:
            return np.arange(self.windows)
        if self._drawn[0] != epoch:
            self._drawn = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows))
        return self._drawn[1]


class Batches(DataLoader[Any]):
    """A sized loader that knows how far it was read; Lightning saves and restores it with the run."""

    def __init__(
        self, shard: Shard, seq_len: int, batch_size: int, seed: int | None, workers: int, packing: str = "cut"
    ) -> None:
        windows = PACKINGS[packing](shard, seq_len)
        self.order = Order(len(windows), batch_size, seed)
        self.corpus = {"windows": len(windows), "batch_size": batch_size, "seq_len": seq_len, "corpus": shard.name}
        self.corpus["packing"] = packing
        ratio = shard.bytes_per_token
        super().__init__(
            windows,
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=lambda items: collate(items, seq_len, ratio),
            multiprocessing_context="fork" if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.order.seed is None:
            self.order.taken = 0
        for batch in super().__iter__():
            self.order.taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.order.seed, "taken": self.order.taken, **self.corpus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the run that was stopped read other batches."""
        for key, now in self.corpus.items():
            if state[key] != now:
                raise ValueError(
                    f"the run to resume had data.{key} = {state[key]}, and this one has {now}; "
                    "resume with the same data, or start a new run from its checkpoint/"
                )
        self.order.seed, self.order.taken = state["seed"], state["taken"]


def collate(items: list[Item], seq_len: int, bytes_per_token: float) -> Batch:
    """Rows of T tokens; short rows are filled with targets that do not count. Targets stay inside a document.

    A prompt's tokens are no targets.
    """
    tokens = torch.zeros(len(items), seq_len + 1, dtype=torch.int64)
    document = torch.full_like(tokens, -1)
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (ids, owner, may) in enumerate(items):
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        document[row, : len(ids)] = torch.from_numpy(owner)
        counts[row, : len(ids)] = torch.from_numpy(may)
    inside = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    targets = torch.where(inside & counts[:, 1:], tokens[:, 1:], IGNORED)
    whole = bool((document[:, :-1] == document[:, :1]).all())
    return Batch(tokens[:, :-1], targets, None if whole else document[:, :-1].contiguous(), bytes_per_token)


class TextData(L.LightningDataModule):
    """Text for `fit` and `test`: rows of seq_len tokens, each token seeing only its own document.

    A document is a file of text, or a line of a .jsonl file: {"text": ...}, or {"prompt": ..., "completion": ...}, of
    which the completion alone is learned.

    Args:
        path: a folder or a file of text; by default Python's own standard-library sources on this machine.
        pattern: which files of the folder to read.
        tokenizer: a tokenizer.json or its folder; by default what the stack's tokenizer_contract says.
        seq_len: tokens in a row.
        batch_size: rows in a batch.
        held_out: share of the documents kept for validation and test, chosen by the hash of their names.
        seed: of the shuffling; by default what torch was seeded with.
        workers: processes that load batches.
        cache_dir: where token shards are kept; by default the user's cache folder.
        text_key: the key of the text in .jsonl lines.
        packing: `cut` cuts the documents, end to end, into rows; `packed` places whole documents into rows, first fit,
            and cuts only those longer than a row.
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
        text_key: str = "text",
        packing: str = "cut",
    ) -> None:
        super().__init__()
        _check_range("seq_len", seq_len, 1, 1 << 24)
        _check_range("batch_size", batch_size, 1, 1 << 20)
        _check_range("workers", workers, 0, 1024)
        _check_range("seed", 0 if seed is None else seed, 0, (1 << 63) - 1)
        if path == "":
            raise ValueError("data.path is empty: give a folder or a file of text")
        if not 0 < held_out < 1:
            raise ValueError(f"data.held_out = {held_out} must lie between 0 and 1")
        if not text_key:
            raise ValueError("data.text_key is empty: name the key of the text in .jsonl lines, such as text")
        if packing not in PACKINGS:
            raise ValueError(f"data.packing = {packing!r} must be one of {', '.join(PACKINGS)}")
        self.text_key, self.packing = text_key, packing
        self.path, self.pattern, self.tokenizer = path, pattern, tokenizer
        self.seq_len, self.batch_size, self.held_out = seq_len, batch_size, held_out
        self.seed, self.workers = seed, workers
        self.cache = Path(cache_dir) if cache_dir else _user_cache()
        self.shards: dict[str, Shard] = {}
        self.text_tokenizer: Tokenizer | None = None

    def setup(self, stage: str | None = None) -> None:
        model = getattr(self.trainer, "lightning_module", None)
        contract = self._contract(None if model is None else model.spec.tokenizer_contract)
        folder = None if model is None or self.tokenizer is not None else model.weights
        self.text_tokenizer = tokenizer_of(contract, folder)
        if model is not None:
            check_fits(self.text_tokenizer, model.spec.model.vocab_size)
        files = standard_library() if self.path is None else list_files(Path(self.path), self.pattern)
        self.shards = shards(files, self.text_tokenizer, self.held_out, self.cache, self.text_key)

    def _contract(self, stacks: ByteTokenizer | HFTokenizer | None) -> ByteTokenizer | HFTokenizer:
        """The stack's contract, with another file if one is given. Raises ValueError where the stack speaks bytes."""
        if self.tokenizer is None:
            return stacks or ByteTokenizer(type="byte")
        if isinstance(stacks, ByteTokenizer):
            raise ValueError(
                f"data.tokenizer = {self.tokenizer!r}, but the stack's tokenizer_contract is byte; "
                f"write tokenizer_contract: {{type: hf, pretrained: {self.tokenizer}}} into the stack file"
            )
        if stacks is None:
            return HFTokenizer(type="hf", pretrained=self.tokenizer)
        return stacks.model_copy(update={"pretrained": self.tokenizer})

    def train_dataloader(self) -> Batches:
        seed = torch.initial_seed() % 2**32 if self.seed is None else self.seed
        return self._batches("train", seed)

    def val_dataloader(self) -> Batches:
        return self._batches("held_out", None)

    def _batches(self, split: str, seed: int | None) -> Batches:
        """Checked against the stack here and not in `setup`: by now Lightning has built it, in its own dtype."""
        model = getattr(self.trainer, "lightning_module", None)
        if model is not None:
            _check_length(self.seq_len, model)
        return Batches(self.shards[split], self.seq_len, self.batch_size, seed, self.workers, self.packing)

    def test_dataloader(self) -> Batches:
        return self.val_dataloader()


def _check_range(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"data.{key} = {value} must lie between {low} and {high}")


def _check_length(seq_len: int, model: Any) -> None:
    try:
        model.model.check_length(seq_len, training=True)
    except ValueError as error:
        raise ValueError(f"data.seq_len = {seq_len}: {error}") from None


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eulerstack"
