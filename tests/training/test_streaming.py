"""Rows in an object store: the same rows, in an order that no worker or rank changes, resumed to the bit."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eulerstack as es
from eulerstack.data import streaming
from eulerstack.data.order import NEAR, permuted

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # files that litdata leaves to be collected
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def data(path: str, cache: Path, **options: Any) -> es.TextData:
    given = {"seq_len": 50, "batch_size": 3, "seed": 5, "held_out": 0.2, **options}
    return es.TextData(path, cache_dir=str(cache), **given)


def ready(path: str, cache: Path, **options: Any) -> es.TextData:
    made = data(path, cache, **options)
    made.setup()
    return made


def test_blocks_are_near_each_other_and_every_row_comes_once() -> None:
    order = permuted((1, 2), 1003, 10)
    assert sorted(order.tolist()) == list(range(1003))
    assert all(len({row // 10 for row in order[at : at + 40].tolist()}) <= 2 * NEAR for at in range(0, 1000, 40))
    assert not np.array_equal(order, permuted((1, 3), 1003, 10))
    assert np.array_equal(order, permuted((1, 2), 1003, 10))


def test_without_litdata_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"s3://a/b needs litdata: pip install 'eulerstack\[stream\]'"):
        ready("s3://a/b", tmp_path)


@pytest.fixture
def written(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("litdata")
    monkeypatch.setattr(streaming, "CHUNK", 3000)
    data(str(corpus), tmp_path / "cache", packing="packed").write_stream(tmp_path / "rows")
    return tmp_path / "rows"


def rows(made: es.TextData, split: str) -> list[list[int]]:
    (found,) = made._sets(split)
    return [found[index].tokens.tolist() for index in range(len(found))]


def test_rows_are_those_of_the_text(corpus: Path, written: Path, tmp_path: Path) -> None:
    text, stream = (ready(str(p), tmp_path / "cache", packing="packed") for p in (corpus, written))
    assert len(list((written / "train").glob("*.bin"))) > 3
    for split in ("train", "held_out"):
        assert rows(stream, split) == rows(text, split)
    for mine, theirs in zip(stream.val_dataloader(), text.val_dataloader(), strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.targets, theirs.targets)
        assert mine.bytes_per_token == theirs.bytes_per_token
        assert (mine.document is None) == (theirs.document is None)
    assert stream.yardsticks == text.yardsticks


def test_any_workers_read_the_same_and_resume_to_the_bit(written: Path, tmp_path: Path) -> None:
    """Chunks are fetched from another place, as from a store."""
    far = f"local:{written}"
    loader = ready(far, tmp_path / "cache", packing="packed").train_dataloader()
    both = [batch.tokens for _ in range(2) for batch in loader]
    for workers, stop in ((0, 4), (2, 7)):
        half = ready(far, tmp_path / "cache", packing="packed", workers=workers).train_dataloader()
        got = []
        for batch in half:
            got.append(batch.tokens)
            if len(got) == stop:
                break
        rest = ready(far, tmp_path / "cache", packing="packed", workers=workers, seed=9).train_dataloader()
        rest.load_state_dict(half.state_dict())
        got += [batch.tokens for batch in rest]
        assert len(got) == len(rest) + stop
        assert all(torch.equal(a, b) for a, b in zip(got, both, strict=False))


def test_streams_mix(corpus: Path, written: Path, tmp_path: Path) -> None:
    sources = [{"path": str(written), "weight": 1}, {"path": str(corpus), "weight": 1}]
    options: dict[str, Any] = {"seq_len": 50, "batch_size": 4, "seed": 5, "held_out": 0.2, "packing": "packed"}
    made = es.TextData(sources=sources, cache_dir=str(tmp_path / "cache"), **options)
    made.setup()
    first = len(made._sets("train")[0])
    assert [sum(row < first for row in made.train_dataloader().order.batch(at)) for at in range(5)] == [2] * 5
    assert len(next(iter(made.train_dataloader())).tokens) == 4
    with pytest.raises(ValueError, match="a stream is written of one text"):
        made.write_stream(tmp_path / "more")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "cut"}, r"data\.packing = 'cut', but the rows in .* were written with 'packed'"),
        ({"seq_len": 60}, r"data\.seq_len = 60, but the rows in .* were written with 50; give that one"),
        ({"held_out": 0.1}, r"data\.held_out = 0\.1, but the rows in"),
        ({"pattern": "*.txt"}, r"data\.pattern is for text"),
        ({"packing": "cut", "carry_state": True}, r"data\.carry_state is for text"),
    ],
)
def test_what_was_settled_cannot_be_changed(
    written: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ready(str(written), tmp_path / "cache", **{"packing": "packed", **options})


def test_another_tokenizer_is_refused(written: Path, tmp_path: Path) -> None:
    from ..inference.test_generate import word_tokenizer

    with pytest.raises(ValueError, match="were written with another tokenizer than the stack's"):
        ready(str(written), tmp_path / "cache", packing="packed", tokenizer=str(word_tokenizer(tmp_path)))


def test_no_stream_and_no_room_are_sentences(corpus: Path, written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path = 'local:/nowhere' cannot be read as a stream of rows"):
        ready("local:/nowhere", tmp_path / "cache")
    with pytest.raises(ValueError, match="is there already: give a folder that is not"):
        data(str(corpus), tmp_path / "cache").write_stream(written)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # litdata's
@pytest.mark.parametrize("damage", ["changed", "missing", pytest.param("truncated", marks=pytest.mark.slow)])
def test_a_damaged_chunk_is_a_sentence(written: Path, tmp_path: Path, damage: str) -> None:
    """litdata waits two minutes for a chunk to have its size."""
    chunk = written / "train" / "chunk-0-2.bin"
    content = chunk.read_bytes()
    if damage == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(content[:-90] if damage == "truncated" else content[:-90] + b"~" + content[-89:])
    (stream,) = ready(f"local:{written}", tmp_path / "cache", packing="packed")._sets("train")
    block = stream.block  # type: ignore[attr-defined]
    assert len(stream[2 * block - 1].tokens)
    word = "is not as it was written" if damage == "changed" else "cannot be read"
    with pytest.raises(OSError, match=rf"row \d+ of .*train {word}"):
        [stream[index] for index in range(2 * block, 3 * block)]
