"""TextData: any text as batches of tokens, in an order that can be resumed to the bit."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ..data.batches import Batch, Batches
from ..data.corpus import Shard, shards
from ..data.documents import TextFile
from ..data.order import InOrder, InStreams, Mixed, Order, Repeated, Shuffled
from ..data.rows import PACKINGS, RowSet, Streamed, Together, Windows
from ..data.sources import Source, digest_of_files, sources_of, to_test
from ..data.streaming import Stream, is_stream, open_streams, write_streams
from ..paths import expand_home
from ..spec import ByteTokenizer, HFTokenizer, StackSpec, spec_of
from ..stored import check_checkpoint
from ..tokens import Tokenizer, check_fits, tokenizer_of
from .carry import check_carries

__all__ = ["Batch", "Batches", "TextData"]

HELD_OUT = 0.02
TRAINED_ON = "trained_on"
"""In a checkpoint's header: `TextData.trained_on` of the run."""


class TextData(L.LightningDataModule):
    """Text for `fit` and `test`: rows of seq_len tokens, each token seeing only its own document.

    What is tested: the path's split `test`, or its validation; without splits all of the path, except for what the
    weights, or this object, were trained on: of the same files, and of the standard library, what training holds out.
    A held_out that is given measures what training with it holds out.

    A document is a file of text, or a line of a .jsonl file: {"text": ...}, or {"prompt": ..., "completion": ...}, of
    which the completion alone is learned; or a row, with such columns, of a .parquet file or of a folder that Hugging
    Face's `datasets` saved (save_to_disk).

    Args:
        path: a folder or a file of text, lines or tables, or the address, such as s3://bucket/rows, of what
            `write_stream` wrote; by default Python's own standard-library sources here.
        pattern: which files of the folder to read.
        tokenizer: a tokenizer.json or its folder; by default what the stack's tokenizer_contract says.
        seq_len: tokens in a row.
        batch_size: rows in a batch, of all devices together: each takes its share.
        held_out: share of the documents kept for validation, chosen by the hash of their names; 0.02 by default. Where
            the path holds splits (train-*.parquet and validation-*.parquet, folders train and val, what a DatasetDict
            saved), they are used instead.
        seed: of the shuffling; by default what torch was seeded with.
        workers: processes that load batches.
        cache_dir: where token shards are kept; by default the user's cache folder.
        text_key: the key of the text in .jsonl lines, or the column of a table's.
        packing: `cut` cuts the documents, end to end, into rows; `packed` places whole documents into rows, first fit,
            and cuts only those longer than a row.
        tokenize_workers: processes that tokenise, where the tokens of these files are not in the cache; what they have
            finished when a run is killed is not done again.
        sources: instead of a path, a list of {path, weight} and, where they differ, pattern and text_key. Each gives
            its share of the rows, evenly, and is read again in a new order whenever it ends; an epoch is as many rows
            as all of them have. Held-out rows are those of all, once.
        carry_state: train on documents longer than a row: each row of a batch goes on where that row of the batch
            before ended, from the state after it, which gets no gradient (truncated backpropagation). A state ends
            with its document. Rows are read in their order, each epoch from another place; those held out are read
            apart, each from an empty state.
    """

    def __init__(
        self,
        path: str | None = None,
        pattern: str = "*",
        tokenizer: str | None = None,
        seq_len: int = 512,
        batch_size: int = 8,
        held_out: float | None = None,
        seed: int | None = None,
        workers: int = 0,
        cache_dir: str | None = None,
        text_key: str = "text",
        packing: str = "cut",
        tokenize_workers: int = 1,
        sources: list[dict[str, Any]] | None = None,
        carry_state: bool = False,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "seed", "__class__")}
        super().__init__()
        self.save_hyperparameters({**given, "path": path and str(path), "data_seed": seed})
        _check_range("seq_len", seq_len, 1, 1 << 24)
        _check_range("batch_size", batch_size, 1, 1 << 20)
        _check_range("workers", workers, 0, 1024)
        _check_range("tokenize_workers", tokenize_workers, 1, 1024)
        _check_range("seed", 0 if seed is None else seed, 0, (1 << 63) - 1)
        if path == "":
            raise ValueError("data.path is empty: give a folder or a file of text")
        if held_out is not None and not 0 < held_out < 1:
            raise ValueError(f"data.held_out = {held_out} must lie between 0 and 1")
        if not text_key:
            raise ValueError("data.text_key is empty: name the key of the text in .jsonl lines, such as text")
        if packing not in PACKINGS:
            raise ValueError(f"data.packing = {packing!r} must be one of {', '.join(PACKINGS)}")
        self.sources = sources_of(sources, path, pattern, text_key)
        if carry_state:
            _check_one_text(packing, len(self.sources))
        self.carry_state = carry_state
        self.packing, self.tokenizer = packing, tokenizer
        self.seq_len, self.batch_size = seq_len, batch_size
        self.held_out, self._asked = HELD_OUT if held_out is None else held_out, held_out is not None
        self.seed, self.workers, self.tokenize_workers = seed, workers, tokenize_workers
        self.cache = expand_home(cache_dir) if cache_dir else _user_cache()
        self.shards: list[dict[str, Shard] | dict[str, Stream]] = []  # of each source; to test, `held_out` alone
        self.trained_on: dict[str, float] = {}
        """What weights were trained on by this object: the hash of a text's files, and the share that was held out."""
        self.text_tokenizer: Tokenizer | None = None
        self._prepared = False

    def prepare_data(self) -> None:
        """Tokenise, in one process of each machine; the others wait for it, and find it in the cache."""
        self._read(self.trainer is not None and self.trainer.state.fn == TrainerFn.TESTING)
        self._prepared = True

    def setup(self, stage: str | None = None) -> None:
        if not self._prepared:
            self._read(stage == "test")
        self._prepared = False

    def _read(self, testing: bool) -> None:
        model = getattr(self.trainer, "lightning_module", None)
        folder = None if model is None or self.tokenizer is not None else model.weights
        self._read_by(None if model is None else model.spec, folder, testing)
        if model is not None and model.weights is not None and self.tokenizer is not None:
            self._check_trained_with(model.spec.tokenizer_contract, model.weights)

    def _check_trained_with(self, contract: ByteTokenizer | HFTokenizer, weights: Path) -> None:
        """Raises ValueError where a checkpoint's weights were trained with another tokenizer than data.tokenizer."""
        assert self.text_tokenizer is not None
        there = (weights / "tokenizer.json").is_file()
        if there and tokenizer_of(contract, weights).fingerprint() != self.text_tokenizer.fingerprint():
            raise ValueError(
                f"data.tokenizer = {self.tokenizer!r} is another tokenizer than the one in {weights}, with which its "
                "weights were trained; leave data.tokenizer out"
            )

    def _read_by(self, spec: StackSpec | None, folder: Path | None = None, testing: bool = False) -> None:
        """By a stack's tokenizer; a checkpoint's own, in `folder`, comes first."""
        contract = self._contract(None if spec is None else spec.tokenizer_contract)
        self.text_tokenizer = tokenizer_of(contract, folder)
        if spec is not None:
            check_fits(self.text_tokenizer, spec.model.vocab_size)
        self.shards = [self._read_source(source, testing) for source in self.sources]

    def _read_source(self, source: Source, testing: bool) -> dict[str, Shard] | dict[str, Stream]:
        if source.path is not None and is_stream(source.path):
            return self._stored(source.path, source.pattern, testing)
        return self._to_test(source) if testing else self._to_train(source)

    def _to_train(self, source: Source) -> dict[str, Shard]:
        files = source.files()
        self._note_training(digest_of_files(files))
        chosen = source.to_train(files)
        if said := source.splits_said(files):
            unused = self._asked and any(file.split for file in chosen)
            _tell(f"{said}; data.held_out is not used" if unused else said)
        return self._shards(source, chosen, self.held_out)

    def _to_test(self, source: Source) -> dict[str, Shard]:
        files = source.files()
        split, found = to_test(files)
        held_out = self._held_out_of(source, files)
        if found or held_out is None:
            made = self._shards(source, found or files, 1.0)
            what = f"the {split} split" if found else "all"
        else:
            made = self._shards(source, source.to_train(files), held_out)
            what = f"what training with data.held_out = {held_out} leaves out"
        count = len(made["held_out"].starts)
        _tell(f"measured: {what} of {source.name}, {count:,} document{'s' * (count != 1)}")
        return {"held_out": made["held_out"]}

    def _held_out_of(self, source: Source, files: list[TextFile]) -> float | None:
        """The share that was held out where these files were trained on, or that is asked for; None to test all."""
        if self._asked:
            return self.held_out
        known = self._trained_before() | self.trained_on
        return known.get(digest_of_files(files), self.held_out if source.path is None else None)

    def _note_training(self, digest: str) -> None:
        """The smaller of two shares that were held out lies in the other one."""
        before = self._trained_before()
        self.trained_on = before | self.trained_on | {digest: min(self.held_out, before.get(digest, 1))}

    def _trained_before(self) -> dict[str, float]:
        """What the checkpoint that the weights come from says; nothing where it is of an earlier version."""
        folder = getattr(getattr(self.trainer, "lightning_module", None), "weights", None)
        found: dict[str, float] = {} if folder is None else check_checkpoint(folder).get(TRAINED_ON, {})
        return found

    def _shards(self, source: Source, files: list[TextFile], held_out: float) -> dict[str, Shard]:
        assert self.text_tokenizer is not None
        return shards(files, self.text_tokenizer, held_out, self.cache, source.text_key, self.tokenize_workers)

    def _stored(self, path: str, pattern: str, testing: bool) -> dict[str, Stream]:
        """Rows that `write_stream` wrote, whose splits are settled."""
        if pattern != "*" or self.carry_state:
            key = "carry_state" if self.carry_state else "pattern"
            raise ValueError(f"data.{key} is for text, and {path} holds rows that were made of it; leave it out")
        assert self.text_tokenizer is not None
        found = open_streams(path, self.text_tokenizer, self.cache, **self._settled)
        if testing:
            _tell(f"measured: what is held out in {path}, {len(found['held_out']):,} rows")
        return found

    @property
    def _settled(self) -> dict[str, Any]:
        """What rows that were written cannot change."""
        return {"seq_len": self.seq_len, "packing": self.packing, "held_out": self.held_out}

    def write_stream(self, folder: str | Path, spec: str | Path | StackSpec | None = None) -> None:
        """Write these rows for an object store: copy the folder there, and give its address as data.path.

        spec: a stack that is to read them, for its tokenizer. Raises ValueError where the folder is there already, and
        for several sources.
        """
        stack = None if spec is None else spec_of(spec)
        place = expand_home(spec) if isinstance(spec, str | Path) else None
        self._read_by(stack, place if place is not None and place.is_dir() else None)
        (mine,) = self.shards if len(self.shards) == 1 else [{}]
        of_text = {split: shard for split, shard in mine.items() if isinstance(shard, Shard)}
        if not of_text:
            raise ValueError("a stream is written of one text: write one for each source, and mix those")
        assert self.text_tokenizer is not None
        rows = {split: self._row_set(shard) for split, shard in of_text.items()}
        write_streams(expand_home(folder), rows, of_text, self.text_tokenizer, **self._settled)

    @property
    def yardsticks(self) -> dict[str, float]:
        """Bits a byte of simpler models of the held-out text; of several sources, each source's, by its bytes."""
        held = [one["held_out"] for one in self.shards]
        sizes = [shard.size * shard.bytes_per_token for shard in held]
        return {
            name: sum(size * shard.yardsticks[name] for size, shard in zip(sizes, held, strict=True)) / sum(sizes)
            for name in held[0].yardsticks
        }

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
        """In an order of its own from the first batch; where a run asks again, on from where its last loader was."""
        before = self.trainer.train_dataloader if self.trainer is not None and self.trainer.training else None
        of_run = before.order if isinstance(before, Batches) else None
        seed = self._drawn_seed() if of_run is None or of_run.seed is None else of_run.seed
        made = self._carried_batches(seed) if self.carry_state else self._mixed_batches(seed)
        made.order.taken = 0 if of_run is None else of_run.taken
        return made

    def _drawn_seed(self) -> int:
        seed = torch.initial_seed() % 2**32 if self.seed is None else self.seed
        if self.trainer is not None:
            seed = self.trainer.strategy.broadcast(seed)  # a rank that was seeded apart would read other rows
        return seed

    def _mixed_batches(self, seed: int) -> Batches:
        sets = self._sets("train")
        sizes, shares = [len(one) for one in sets], [source.share for source in self.sources]
        blocks = [one.block if isinstance(one, Stream) else None for one in sets]

        def order(seed: int | None) -> Order:
            if len(sets) > 1:
                return Mixed(sizes, shares, self.batch_size, seed, self._share(), blocks)
            return Shuffled(sizes[0], self.batch_size, seed, self._share(), blocks[0])

        return self._batches("train", Together(sets), self._overfit(order, seed), shares)

    def _carried_batches(self, seed: int) -> Batches:
        shard = self.shards[0]["train"]
        assert isinstance(shard, Shard)
        rows = Streamed(Windows(shard, self.seq_len))
        order = self._overfit(lambda seed: InStreams(len(rows), self.batch_size, seed, self._share()), seed)
        longest = int(np.diff(shard.starts, append=len(shard.tokens)).max())
        model = getattr(self.trainer, "lightning_module", None)
        if model is not None:
            check_carries(model, longest)
        return self._batches("train", rows, order, [Fraction(1)], max(longest, self.seq_len))

    def _overfit(self, order: Callable[[int | None], Order], seed: int) -> Order:
        """The order of this seed; with the Trainer's overfit_batches, so many of its batches unshuffled."""
        most: int | float = 0 if self.trainer is None else self.trainer.overfit_batches  # type: ignore[attr-defined]
        if not most:
            return order(seed)
        plain = order(None)
        count = min(len(plain), most) if isinstance(most, int) else int(len(plain) * most)
        return Repeated(plain, max(1, count), seed)

    def val_dataloader(self) -> Batches:
        sets = self._sets("held_out")
        sizes = [len(one) for one in sets]
        order = InOrder(sum(sizes), self.batch_size, self._share())
        return self._batches("held_out", Together(sets), order, [Fraction(size, sum(sizes)) for size in sizes])

    def _sets(self, split: str) -> list[RowSet]:
        return [self._row_set(one[split]) for one in self.shards]

    def _row_set(self, split: Shard | Stream) -> RowSet:
        return split if isinstance(split, Stream) else PACKINGS[self.packing](split, self.seq_len)

    def _share(self) -> tuple[int, int]:
        """This process's rank among those that share each batch, and their number."""
        found = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if found is None else (int(found["rank"]), int(found["num_replicas"]))

    def _batches(
        self, split: str, rows: Together | Streamed, order: Order, shares: list[Fraction], reach: int = 0
    ) -> Batches:
        """Checked against the stack here and not in `setup`: by now Lightning has built it, in its own dtype."""
        model = getattr(self.trainer, "lightning_module", None)
        if model is not None:
            _check_length(self.seq_len, model)
        mine = [one[split] for one in self.shards]
        ratio = sum(float(share) * shard.bytes_per_token for share, shard in zip(shares, mine, strict=True))
        read = {"windows": len(rows), "batch_size": self.batch_size, "seq_len": self.seq_len, "packing": self.packing}
        if len(mine) == 1:
            read["corpus"] = mine[0].name
        else:
            read["sources"] = [f"{share} of {shard.name}" for share, shard in zip(shares, mine, strict=True)]
        if reach:
            read["carry_state"] = True
        return Batches(rows, order, self.seq_len, ratio, self.workers, read, reach)

    def test_dataloader(self) -> Batches:
        return self.val_dataloader()


@rank_zero_only
def _tell(sentence: str) -> None:
    print(sentence, flush=True)


def _check_range(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"data.{key} = {value} must lie between {low} and {high}")


def _check_one_text(packing: str, sources: int) -> None:
    if packing != "cut" or sources > 1:
        other = "data.sources" if sources > 1 else f"data.packing = {packing}"
        raise ValueError(f"data.carry_state reads one text in its order, and not with {other}; leave one of them out")


def _check_length(seq_len: int, model: Any) -> None:
    try:
        model.model.check_length(seq_len, training=True)
    except ValueError as error:
        raise ValueError(f"data.seq_len = {seq_len}: {error}") from None


def _user_cache() -> Path:
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "eulerstack"
