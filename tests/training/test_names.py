"""Files by their names and marks: kinds whatever their case, what is refused, names that are no UTF-8, and links."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eulerstack as es
from eulerstack.data import documents
from eulerstack.data.corpus import list_files
from eulerstack.data.tokenizing import Parts

from .test_tables import ROWS, parquet, tokens

LINES = "".join(json.dumps({"text": f"héllo {i}"}) + "\n" for i in range(50)).encode()


def made(path: Path, **options: Any) -> es.TextData:
    data = es.TextData(str(path), seq_len=32, cache_dir=str(path.parent / "cache"), **options)
    data.prepare_data()
    data.setup()
    return data


def texts(data: es.TextData) -> list[bytes]:
    shards = data.shards[0].values()
    return sorted(bytes(part) for shard in shards for part in np.split(shard.tokens, shard.starts[1:]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "0.txt").write_text("zero")
    (tmp_path / "texts" / "1.txt").write_text("one")
    return tmp_path / "texts"


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.NdJson", "a.jsonlines", "b.x.JsonL"])
@pytest.mark.parametrize("alone", [True, False])
def test_lines_by_any_of_their_names(folder: Path, name: str, alone: bool) -> None:
    (folder / name).write_bytes(LINES)
    found = texts(made(folder / name if alone else folder))
    assert found == sorted([f"héllo {i}".encode() for i in range(50)] + [b"zero", b"one"] * (not alone))


def test_a_table_by_its_name_in_capitals(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    wanted = tokens(made(parquet(tmp_path / "rows.parquet", ROWS)))
    assert tokens(made(parquet(tmp_path / "ROWS.Parquet", ROWS))) == wanted


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", r"a\.csv is a table of a kind that is not read: write its rows as \.jsonl"),
        ("a.TSV", r"a\.TSV is a table"),
        ("a.jsonl.gz", r"a\.jsonl\.gz is compressed and is not read: unpack it"),
        *((f"a{suffix}", "is compressed") for suffix in (".zst", ".bz2", ".xz", ".zip", ".TAR", ".tgz", ".7z")),
        *((f"a{suffix}", "holds numbers") for suffix in (".bin", ".npy", ".npz", ".pt", ".safetensors", ".pkl")),
        ("a.PDF", "save it as .txt"),
        ("a.png", "is a picture"),
        ("a.so", "is a program"),
    ],
)
def test_files_that_are_surely_no_text_are_refused(folder: Path, name: str, message: str) -> None:
    (folder / name).write_text("these bytes are UTF-8")
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=message):
            made(path)
    assert texts(made(folder, pattern="*.txt")) == [b"one", b"zero"]


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (LINES, True),
        (b"\n[" + LINES.replace(b"\n", b",") + b"{}]", True),
        (b'{"prompt": "a", "completion": "b"}', True),
        (b'{"name": "a", "text": ["b"]}', False),
        (b'["text"]', False),
        (b"[" * 5000, False),
        (b"3 is no object", False),
    ],
)
def test_rows_in_json_are_not_learned_with_their_braces(folder: Path, content: bytes, refused: bool) -> None:
    (folder / "a.json").write_bytes(content)
    if refused:
        with pytest.raises(ValueError, match=r'a\.json holds rows such as {"text": ...}: write an object a line'):
            made(folder)
    else:
        assert texts(made(folder)) == sorted([content, b"one", b"zero"])


def test_the_mark_of_utf8_is_none_of_the_text(folder: Path) -> None:
    (folder / "0.txt").write_bytes(b"\xef\xbb\xbfzero\r\n\xef\xbb\xbf")
    (folder / "1.jsonl").write_bytes(b"\xef\xbb\xbf\n\xef\xbb\xbf" + LINES)
    (folder / "2.txt").write_bytes(b"\xef\xbb\xbf")
    found = texts(made(folder))
    assert found == sorted([f"héllo {i}".encode() for i in range(50)] + [b"one", b"zero\n\xef\xbb\xbf"])
    with pytest.raises(ValueError, match=r"2\.txt' is an empty file"):
        made(folder / "2.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16-BE", "UTF-32"])
def test_other_marks_are_named(folder: Path, name: str, encoding: str) -> None:
    mark = b"\xfe\xff" if encoding == "UTF-16-BE" else b""
    (folder / name).write_bytes(mark + '{"text": "hello"}'.encode(encoding))
    with pytest.raises(ValueError, match=rf"{name} is no UTF-8 text but {encoding[:6]}: save it as UTF-8"):
        made(folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_names_that_are_no_utf8_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr("eulerstack.data.tokenizing.PART", 40)
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9"))
    folder.mkdir()
    for i in range(9):
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9 %d.txt" % i)).write_text(f"coffee {i} " * 9)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jsonl")).write_bytes(LINES + b"{\n")
    for _ in range(2):  # read, and from the cache
        with pytest.warns(
            UserWarning, match="skipped 1 of 51 lines of .*/\ufffdt\ufffd/\ufffd.jsonl: first at line 51"
        ):
            data = made(folder, held_out=0.3, tokenize_workers=processes)
        assert len(texts(data)) == 59
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_table_whose_name_is_no_utf8(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))
    wanted = tokens(made(parquet(tmp_path / "rows.parquet", ROWS)))
    (tmp_path / "rows.parquet").rename(file)
    assert tokens(made(file)) == wanted
    file.write_text("no table")
    with pytest.raises(ValueError, match=re.escape("caf\ufffd.parquet cannot be read as Parquet")):
        made(file)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a text, outside the one that is read."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "far.txt").write_text("far")
    return tmp_path / "elsewhere"


def test_linked_folders_are_read_once(folder: Path, elsewhere: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "2.txt").write_text("two")
    (folder / "again").symlink_to(folder / "below")
    (folder / "below" / "up").symlink_to(folder)
    (folder / "out").symlink_to(folder.parent)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "more").symlink_to(elsewhere / "deep")
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "round").symlink_to(elsewhere)
    assert [file.name for file in list_files(folder)] == ["0.txt", "1.txt", "below/2.txt", "linked/deep/far.txt"]


def test_a_link_to_a_hidden_folder_is_followed(folder: Path, elsewhere: Path) -> None:
    elsewhere.rename(folder / ".kept")
    (folder / "linked").symlink_to(folder / ".kept")
    assert [file.name for file in list_files(folder)] == ["0.txt", "1.txt", "linked/deep/far.txt"]


def test_linked_files_are_read(folder: Path, elsewhere: Path) -> None:
    (folder / "2.txt").symlink_to(elsewhere / "deep" / "far.txt")
    assert texts(made(folder)) == [b"far", b"one", b"zero"]


@pytest.mark.parametrize("target", ["nowhere.txt", "2.txt"])
def test_a_link_to_nothing_is_named(folder: Path, target: str) -> None:
    (folder / "2.txt").symlink_to(folder / target)
    with pytest.raises(ValueError, match=r"2\.txt is a link to nothing, or to itself"):
        made(folder)
    assert texts(made(folder, pattern="[01].txt")) == [b"one", b"zero"]


def test_a_pipe_is_named(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe is no file with text but a pipe"):
        made(folder)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["0.txt", "1.txt", "a/b/3.md", "a/b/3.txt", "a/2.txt"]),
        ("*.md", ["a/b/3.md"]),
        ("b/*", ["a/b/3.md", "a/b/3.txt"]),
        ("a/*.txt", ["a/2.txt"]),
        ("a/**/*.txt", ["a/b/3.txt", "a/2.txt"]),
        ("**/[0-2].txt", ["0.txt", "1.txt", "a/2.txt"]),
    ],
)
def test_patterns_are_those_of_pathlib(folder: Path, pattern: str, names: list[str]) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    for name in ("a/2.txt", "a/b/3.txt", "a/b/3.md", ".hidden", "a/.git"):
        (folder / name).write_text(name)
    found = [file.name for file in list_files(folder, pattern)]
    assert sorted(found) == sorted(names)
    assert {folder / name for name in found} == {p for p in folder.rglob(pattern) if p.is_file() and p.name[0] != "."}


def refuse(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does to all but root, who runs the tests."""
    opened, listed = Path.open, os.scandir

    def refused(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(path: Path, *rest: Any, **more: Any) -> Any:
            if Path(path) == place:
                raise PermissionError(13, "Permission denied", str(place))
            return call(path, *rest, **more)

        return run

    monkeypatch.setattr(Path, "open", refused(opened))
    monkeypatch.setattr(os, "scandir", refused(listed))


@pytest.mark.parametrize("name", ["1.txt", "below"])
def test_what_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (folder / "below").mkdir()
    refuse(folder / name, monkeypatch)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: Permission denied"):
        made(folder)


@pytest.mark.parametrize("name", ["1.txt", "1.jsonl"])
def test_a_file_that_is_gone_when_it_is_read_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(LINES)
    source = es.TextData(str(folder)).sources[0]
    files = source.files()
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} cannot be read: No such file"):
        documents.pieces(next(file for file in files if file.name == name), 100)
    whole = documents.TextFile(name, folder / name, "", (0, 0))
    with pytest.raises(ValueError, match=rf"{name} cannot be read: No such file"):
        documents.read(documents.Piece(whole, 0, 9, 1, 9), "text")


def test_a_file_that_changes_while_it_is_read_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of it would stand under the hash of what was there before."""
    write = Parts.write

    def changed(self: Parts, number: int) -> None:
        (folder / "1.txt").write_text("another text")
        write(self, number)

    monkeypatch.setattr(Parts, "write", changed)
    with pytest.raises(ValueError, match=r"1\.txt was changed while it was read"):
        made(folder)
    monkeypatch.setattr(Parts, "write", write)
    (folder / "1.txt").write_text("one")
    assert texts(made(folder)) == [b"one", b"zero"]
