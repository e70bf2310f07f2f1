"""Rows in an object store: written once with litdata, and read a chunk at a time as an order of ours asks for them.

litdata's own order depends on the number of workers. Here a row is asked for by its number, so that the order is the
one of `order.py`, whatever reads it; litdata fetches the chunk that holds it, and keeps it in its cache.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from ..tokens import Tokenizer
from .corpus import Shard
from .rows import Item, RowSet
from .splits import SPLITS

FORMAT = 1
CHUNK = 1 << 24
"""Bytes of rows in a chunk, which is what is fetched at once."""


@dataclass
class Stream:
    """One split's rows, by number, in whatever process asks. About them, what a `Shard` knows of its tokens."""

    place: str
    cache: Path
    rows: int
    block: int  # rows in a chunk
    name: str
    bytes_per_token: float
    yardsticks: dict[str, float]
    size: int  # tokens
    _opened: tuple[int, Any] = field(default=(0, None), repr=False)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Item:
        if self._opened[0] != os.getpid():  # what is open does not outlive a fork
            self._opened = os.getpid(), _dataset(self.place, self.cache)
        try:
            found = self._opened[1][index]
            tokens, document, may, kept = (np.asarray(found[key]) for key in ("tokens", "document", "may", "sum"))
        except Exception as error:  # each store has its own
            raise OSError(f"row {index} of {self.place} cannot be read: {error}") from error
        if int(kept[0]) != _sum(tokens, document, may):
            raise OSError(f"row {index} of {self.place} is not as it was written: copy the rows there again")
        return Item(tokens.astype(np.int64), document.astype(np.int64), may.astype(np.bool_))


def is_stream(path: str) -> bool:
    """Whether a path names rows that litdata reads: an address such as s3://..., or a folder that was written so."""
    return "://" in path or path.startswith("local:") or (Path(path) / "about" / "index.json").is_file()


def open_streams(path: str, tokenizer: Tokenizer, cache: Path, **asked: Any) -> dict[str, Stream]:
    """Both splits. asked: the data.* values that were settled when the rows were written.

    Raises ValueError where these differ, where the tokenizer is another, and for what is no such place.
    """
    _check_installed(path)
    try:
        about: dict[str, Any] = json.loads(str(_dataset(f"{path}/about", cache)[0]))
    except Exception as error:  # each store has its own
        raise ValueError(f"data.path = {path!r} cannot be read as a stream of rows: {error}") from None
    if about["format"] != FORMAT:
        raise ValueError(f"data.path = {path!r} has format {about['format']}; this version reads {FORMAT}")
    for key, value in asked.items():
        if about[key] != value:
            raise ValueError(
                f"data.{key} = {value!r}, but the rows in {path} were written with {about[key]!r}; give that one"
            )
    if about["tokenizer"] != tokenizer.fingerprint():
        raise ValueError(
            f"the rows in {path} were written with another tokenizer than the stack's; write them again with this one"
        )
    return {split: Stream(f"{path}/{split}", cache, **about["splits"][split]) for split in SPLITS}


def write_streams(
    folder: Path, rows: dict[str, RowSet], shards: dict[str, Shard], tokenizer: Tokenizer, **settled: Any
) -> None:
    """Both splits' rows as a folder to copy into an object store, whole or not at all.

    Raises ValueError where something is in its place.
    """
    _check_installed(str(folder))
    if folder.exists():
        raise ValueError(f"{folder} is there already: give a folder that is not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new.", dir=folder.parent))
    try:
        splits = {split: _write(work / split, rows[split], shards[split], tokenizer) for split in SPLITS}
        about = {"format": FORMAT, "tokenizer": tokenizer.fingerprint(), "splits": splits, **settled}
        _write_items(work / "about", [json.dumps(about)], 1)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(folder: Path, rows: RowSet, shard: Shard, tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    longest = max(len(rows[index].tokens) for index in range(len(rows)))
    block = max(1, CHUNK // (longest * (dtype.itemsize + 5)))
    _write_items(folder, (_packed(rows[index], dtype) for index in range(len(rows))), block)
    about = {"rows": len(rows), "block": block, "size": len(shard.tokens), "name": shard.name}
    return {**about, "bytes_per_token": shard.bytes_per_token, "yardsticks": shard.yardsticks}


def _packed(item: Item, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Which tokens belong together is kept, and not which document of the corpus it was."""
    tokens, may = item.tokens.astype(dtype), item.may.astype(np.uint8)
    document = (item.document - item.document[0]).astype(np.uint32)
    kept = np.array([_sum(tokens, document, may)], dtype=np.uint32)
    return {"tokens": tokens, "document": document, "may": may, "sum": kept}


def _sum(*arrays: npt.NDArray[Any]) -> int:
    return crc32(b"".join(array.tobytes() for array in arrays))


def _write_items(folder: Path, items: Any, block: int) -> None:
    from litdata.streaming import Cache  # noqa: PLC0415 - an extra

    cache = Cache(str(folder), chunk_size=block)
    for index, item in enumerate(items):
        cache[index] = item
    cache.done()
    cache.merge()


def _dataset(place: str, cache: Path) -> Any:
    from litdata import StreamingDataset  # noqa: PLC0415 - an extra

    made = StreamingDataset(place, cache_dir=str(cache / "streams"))
    made[:0]  # as for every slice, it fetches whole chunks from now on, and not each row by itself
    return made


def _check_installed(path: str) -> None:
    if importlib.util.find_spec("litdata") is None:
        raise ValueError(f"{path} needs litdata: pip install 'eulerstack[stream]'")
