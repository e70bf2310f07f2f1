"""Parquet, and what Hugging Face's `datasets` saves: the same tokens as the same rows as lines of JSON."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eulerstack as es
from eulerstack.data import tokenizing
from eulerstack.data.corpus import list_files

pyarrow: Any = pytest.importorskip("pyarrow")

ROWS: list[dict[str, Any]] = [
    {"text": None, "prompt": "?" * (i % 5), "completion": f"{i} is {i * i}", "id": i} for i in range(50)
]
ROWS += [{"text": f"{i} and {i}", "prompt": None, "completion": None, "id": i} for i in range(50)]


def made(path: Path, cache: Path, **options: Any) -> es.TextData:
    data = es.TextData(str(path), seq_len=24, batch_size=4, seed=3, held_out=0.3, cache_dir=str(cache), **options)
    data.setup()
    return data


def tokens(data: es.TextData) -> list[bytes]:
    """All documents, with a mark behind what is given of each."""
    found = []
    for shard in data.shards[0].values():
        parts = np.split(shard.tokens, shard.starts[1:])
        found += [bytes(p[:n]) + b"|" + bytes(p[n:]) for p, n in zip(parts, shard.given, strict=True)]
    return sorted(found)


@pytest.fixture
def wanted(tmp_path: Path) -> list[bytes]:
    file = tmp_path / "rows.jsonl"
    rows = [{key: value for key, value in row.items() if value is not None} for row in ROWS]
    file.write_text("\n".join(map(json.dumps, rows)))
    return tokens(made(file, tmp_path / "of_lines"))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=17)
    return path


def saved_by_hand(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """What save_to_disk leaves, as its documentation has it, and a cache of `map` that is no part of the data."""
    folder.mkdir()
    table = pyarrow.Table.from_pylist(rows)
    for name in ("data-00000-of-00001.arrow", "cache-1.arrow"):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=30)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_rows_of_tables_are_documents(tmp_path: Path, wanted: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "PART", 900)
    (tmp_path / "folder").mkdir()
    parquet(tmp_path / "folder" / "a.parquet", ROWS[:60])
    saved_by_hand(tmp_path / "folder" / "saved", ROWS[60:])
    assert tokens(made(tmp_path / "folder", tmp_path / "cache", tokenize_workers=2)) == wanted
    assert tokens(made(parquet(tmp_path / "rows.parquet", ROWS), tmp_path / "cache")) == wanted


def test_what_datasets_saves(tmp_path: Path, wanted: list[bytes]) -> None:
    datasets: Any = pytest.importorskip("datasets")

    def made_of(rows: list[dict[str, Any]], name: str) -> Any:
        return datasets.Dataset(
            pyarrow.Table.from_pylist(rows), fingerprint=name
        )  # named: dill cannot hash some pyarrow

    both = {"one": made_of(ROWS[:40], "one"), "two": made_of(ROWS[40:], "two")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    made_of(ROWS, "all").save_to_disk(tmp_path / "one", num_shards=3)
    assert tokens(made(tmp_path / "saved", tmp_path / "cache")) == wanted
    assert tokens(made(tmp_path / "one", tmp_path / "cache")) == wanted
    assert [f.name for f in list_files(tmp_path / "saved", "two/*")] == ["two/data-00000-of-00001.arrow"]


def test_rows_that_are_none_are_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": ""}, {"text": None}]
    with pytest.warns(UserWarning, match=r"skipped 2 of 102 rows of .*: first at row 101: its 'text' is empty"):
        made(parquet(tmp_path / "rows.parquet", rows), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no row to train on; first at row 1: it has no key 'body'"):
        made(parquet(tmp_path / "none.parquet", [{"id": 1}, {"id": 2}]), tmp_path / "cache", text_key="body")
    with pytest.raises(ValueError, match=r"its 'id' is no string"):
        made(tmp_path / "none.parquet", tmp_path / "cache", text_key="id")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_damaged_table_is_a_sentence(tmp_path: Path, name: str) -> None:
    whole = parquet(tmp_path / "whole", ROWS).read_bytes()
    (tmp_path / name).write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=rf"{name} cannot be read as .*damaged or something else"):
        made(tmp_path / name, tmp_path / "cache")


def test_a_damaged_folder_is_a_sentence(tmp_path: Path) -> None:
    folder = saved_by_hand(tmp_path / "saved", ROWS)
    (folder / "data-00000-of-00001.arrow").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow is missing, and .*state\.json names it"):
        made(folder, tmp_path / "cache")
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        made(folder, tmp_path / "cache")


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / "rows.parquet", ROWS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs pyarrow to be read: pip install 'eulerstack\[data\]'"):
        made(file, tmp_path / "cache")
