"""Splits by name train, validate and test as they are named; `test` measures what it says it measures."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

import eulerstack as es
from eulerstack.checkpoint import save_checkpoint
from eulerstack.cli.convert import convert
from eulerstack.data.corpus import list_files
from eulerstack.segments import IGNORED
from eulerstack.stored import check_checkpoint
from eulerstack.training.callbacks import Export

from .conftest import QUIET
from .test_tables import parquet, saved_by_hand

ROWS = {"train": 30, "validation": 5, "test": 7}


def rows(split: str) -> list[dict[str, str]]:
    return [{"text": f"{split} {i} is {i * i}"} for i in range(ROWS[split])]


def lines(file: Path, split: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(split)))
    return file


def data(path: Path, **options: Any) -> es.TextData:
    return es.TextData(str(path), seq_len=24, batch_size=4, cache_dir=str(path.parent / "cache"), **options)


def texts(made: es.TextData, split: str) -> list[str]:
    shard = made.shards[0][split]
    return sorted(bytes(part).decode() for part in np.split(shard.tokens, shard.starts[1:]))


def check_splits(path: Path, **options: Any) -> None:
    """To fit, to test, and what is said of it."""
    made = data(path, **options)
    made.setup("fit")
    assert texts(made, "train") == sorted(row["text"] for row in rows("train"))
    assert texts(made, "held_out") == sorted(row["text"] for row in rows("validation"))
    made = data(path, **options)
    made.setup("test")
    assert texts(made, "held_out") == sorted(row["text"] for row in rows("test"))
    data(path, held_out=0.5, **options).setup("fit")


def dataset_dict(folder: Path, names: dict[str, str]) -> Path:
    folder.mkdir()
    for name, split in names.items():
        saved_by_hand(folder / name, rows(split))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(names)}))
    return folder


@pytest.mark.parametrize("held", ["validation", "valid", "val", "dev"])
def test_a_saved_dataset_dict(tmp_path: Path, held: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    check_splits(dataset_dict(tmp_path / "saved", {"train": "train", held: "validation", "test": "test"}))
    said = capsys.readouterr().out
    assert said.count("data.held_out is not used") == 1
    assert f"validation: {held}/data-00000-of-00001.arrow; test: test/data-00000-of-00001.arrow" in said
    assert "measured: the test split of" in said
    assert "saved, 7 documents" in said


def test_the_names_that_datasets_have_on_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    names = {"train_sft": "train", "dev_r1": "validation", "test_matched": "test"}
    check_splits(dataset_dict(tmp_path / "saved", names))
    made = dataset_dict(tmp_path / "parts", {"one": "train", "two": "validation"})
    assert {file.split for file in list_files(made)} == {None}
    made = dataset_dict(tmp_path / "more", {"train": "train", "unsupervised": "test"})
    assert [(file.name[:5], file.split) for file in list_files(made)] == [("train", "train"), ("unsup", "beside")]


LAYOUTS = {
    "lines": ("train.jsonl", "validation.jsonl", "test.jsonl"),
    "capitals": ("Train.JSONL", "VAL.ndjson", "test.Jsonl"),
    "folders": ("train/a.jsonl", "val/a.jsonl", "test/deep/train.jsonl"),
    "below": ("en/train.jsonl", "en/dev.jsonl", "de/test.jsonl"),
    "numbers": ("train_0.jsonl", "valid.00.jsonl", "test1.jsonl"),
    "words of the hub": ("training.jsonl", "validation.jsonl", "eval.jsonl"),
    "names": ("train-web.jsonl", "validation-web.jsonl", "test-web.jsonl"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_and_folders_with_the_names_of_splits(tmp_path: Path, layout: str) -> None:
    for name, split in zip(LAYOUTS[layout], ROWS, strict=True):
        lines(tmp_path / "texts" / name, split)
    check_splits(tmp_path / "texts")


def test_shards_of_the_hub_beside_a_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "clone" / "data").mkdir(parents=True)
    (tmp_path / "clone" / "README.md").write_text("What this is.")
    for split in ROWS:
        half = len(rows(split)) // 2
        parquet(tmp_path / f"clone/data/{split}-00000-of-00002.parquet", rows(split)[:half])
        parquet(tmp_path / f"clone/data/{split}-00001-of-00002.parquet", rows(split)[half:])
    check_splits(tmp_path / "clone")
    said = capsys.readouterr().out
    assert "train: data/train-00000-of-00002.parquet and 1 more; validation: data/val" in said
    assert "not read: README.md" in said


@pytest.mark.parametrize(
    "names",
    [
        ("a.jsonl", "b.jsonl"),
        ("train.py", "test.py", "model.py"),
        ("src/test/a.txt", "src/main/a.txt"),
        ("train.jsonl", "more.jsonl"),
        ("test_helpers.txt", "training_day.txt", "validity.txt"),
        ("test.txt", "other.txt"),
        ("a/dev/x.txt", "b/x.txt"),
    ],
)
def test_other_names_are_no_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        lines(tmp_path / "texts" / name, "train")
    assert {file.split for file in list_files(tmp_path / "texts")} == {None}


def test_a_readme_is_left_out_where_it_tells_of_splits(tmp_path: Path) -> None:
    for name in ("README.md", "a/README.md", "a/train.jsonl", "a/dev.jsonl", "b/README.md", "b/x.txt"):
        lines(tmp_path / "texts" / name, "train")
    found = {file.name: file.split for file in list_files(tmp_path / "texts")}
    beside = dict.fromkeys(("README.md", "a/README.md"), "beside")
    kept = {"a/train.jsonl": "train", "a/dev.jsonl": "validation", "b/README.md": None, "b/x.txt": None}
    assert found == {**beside, **kept}
    made = data(tmp_path / "texts")
    made.setup("fit")
    assert len(texts(made, "train")) == 30 + 2
    lines(tmp_path / "more" / "train" / "README.md", "train")
    lines(tmp_path / "more" / "test" / "a.jsonl", "test")
    assert [file.split for file in list_files(tmp_path / "more")] == ["test", "train"]


def test_without_a_validation_some_of_the_training_split_is_held_out(tmp_path: Path) -> None:
    lines(tmp_path / "texts/train.jsonl", "train")
    lines(tmp_path / "texts/test.jsonl", "test")
    made = data(tmp_path / "texts", held_out=0.3)
    made.setup("fit")
    both = texts(made, "train") + texts(made, "held_out")
    assert sorted(both) == sorted(row["text"] for row in rows("train"))
    assert 0 < len(texts(made, "held_out")) < 20


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("test.jsonl",), "holds test: test.jsonl, and nothing to train on"),
        (("data/validation-0.jsonl", "data/test-0.jsonl"), "holds validation: data/v.*test: .*and nothing to train on"),
        (("train.jsonl", "val/none"), r"the validation split in .* is empty \(val/none\)"),
    ],
)
def test_splits_that_cannot_be_trained_on_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        lines(tmp_path / "texts" / name, "test")
        if name.endswith("none"):
            (tmp_path / "texts" / name).write_text("")
    with pytest.raises(ValueError, match=message):
        data(tmp_path / "texts").setup("fit")


def test_a_dataset_dict_that_was_half_copied_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = dataset_dict(tmp_path / "saved", {"train": "train"})
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    with pytest.raises(ValueError, match=r"saved/validation is missing, and .*dataset_dict\.json names it"):
        data(folder).setup()
    (folder / "dataset_dict.json").write_text("[]")
    with pytest.raises(ValueError, match=r"dataset_dict\.json is damaged"):
        data(folder).setup()


@pytest.fixture
def trained(tmp_path: Path, stack_file: Path) -> es.StackModule:
    save_checkpoint(es.build(es.load(stack_file)), tmp_path / "checkpoint")
    return es.StackModule(str(tmp_path / "checkpoint"))


@pytest.mark.usefixtures("lightnings_own_warnings")
def test_the_whole_of_a_file_is_tested(
    tmp_path: Path, trained: es.StackModule, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the bits of each line by itself."""
    file = lines(tmp_path / "some.jsonl", "train")
    (found,) = L.Trainer(**QUIET).test(trained, data(file, packing="packed"), verbose=False)
    bits, count = 0.0, 0
    for row in rows("train"):
        ids = torch.tensor(list(row["text"].encode()))[None]
        with torch.no_grad():
            _, parts = trained.model.losses(ids[:, :-1], ids[:, 1:])
        bits += float(parts["cross_entropy"]) / np.log(2) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    made = data(file, packing="packed")
    made.setup("test")
    assert count == sum(int((batch.targets != IGNORED).sum()) for batch in made.test_dataloader())
    assert found["held_out_bits_per_byte"] * made.shards[0]["held_out"].bytes_per_token == pytest.approx(
        bits / count, rel=1e-5
    )
    assert "some.jsonl, 30 documents" in capsys.readouterr().out


def test_one_text_is_tested_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one text and no more")
    made = data(tmp_path / "one.txt")
    made.setup("test")
    assert texts(made, "held_out") == ["one text and no more"]
    assert 0 < made.yardsticks["unigram entropy"] < 5


def held(made: es.TextData) -> list[str]:
    return texts(made, "held_out")


@pytest.mark.usefixtures("lightnings_own_warnings")
def test_what_was_trained_on_is_not_tested(
    tmp_path: Path, stack_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the same object, and by the checkpoint that the run leaves; with held_out given, what that holds out."""
    file = lines(tmp_path / "some.jsonl", "train")
    made = data(file, held_out=0.3)
    trainer = L.Trainer(max_steps=1, callbacks=[Export()], default_root_dir=tmp_path / "run", **QUIET)
    trainer.fit(es.StackModule(str(stack_file)), made)
    kept_out = held(made)
    assert 0 < len(kept_out) < 20
    module = es.StackModule(str(tmp_path / "run" / "checkpoint"))
    assert check_checkpoint(tmp_path / "run" / "checkpoint")["trained_on"] == made.trained_on
    for again in (made, data(file)):
        L.Trainer(**QUIET).test(module, again, verbose=False)
        assert held(again) == kept_out
        assert "what training with data.held_out = 0.3 leaves out of" in capsys.readouterr().out
    convert(str(tmp_path / "run" / "checkpoint"), str(tmp_path / "half"), "bfloat16")
    assert check_checkpoint(tmp_path / "half")["trained_on"] == made.trained_on
    asked = data(file, held_out=0.5)
    L.Trainer(**QUIET).test(module, asked, verbose=False)
    assert set(kept_out) < set(held(asked))
    other = data(lines(tmp_path / "other.jsonl", "test"))
    L.Trainer(**QUIET).test(module, other, verbose=False)
    assert len(held(other)) == ROWS["test"]
    tuned = L.Trainer(max_steps=1, callbacks=[Export()], default_root_dir=tmp_path / "tuned", **QUIET)
    tuned.fit(module, other)
    assert made.trained_on.items() < check_checkpoint(tmp_path / "tuned" / "checkpoint")["trained_on"].items()


def test_without_a_path_what_every_run_holds_out_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = list_files(lines(tmp_path / "lib" / "a.jsonl", "train").parent)
    monkeypatch.setattr("eulerstack.data.sources.standard_library", lambda: files)
    made = [es.TextData(cache_dir=str(tmp_path / "cache")) for _ in range(2)]
    made[0].setup("fit")
    made[1].setup("test")
    assert held(made[0]) == held(made[1])
    assert "data.held_out = 0.02 leaves out of Python's standard library" in capsys.readouterr().out
