"""Tables as rows: Parquet, and the Arrow files that Hugging Face `datasets` saves to a disk."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .names import shown, suffix_of

Place = tuple[int, int, int, int]  # begin, end, number of the first row, bytes


def dataset_files(folder: Path) -> set[Path] | None:
    """The files that hold the rows of what `datasets` saved to this folder; None where it is no such folder.

    Raises ValueError where what the folder says of itself cannot be read, or names a file that is missing.
    """
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return None
    try:
        files = {folder / file["filename"] for file in json.loads(state.read_bytes())["_data_files"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{shown(state)} is damaged: save the dataset again with its save_to_disk") from None
    for file in sorted(files):
        if not file.is_file():
            raise ValueError(
                f"{shown(file)} is missing, and {shown(state)} names it: copy the whole folder, or save it again"
            )
    return files


def is_dict(folder: Path) -> bool:
    """Whether a `datasets.DatasetDict` was saved to this folder.

    Raises ValueError where what the folder says of itself cannot be read, or names a split that is missing.
    """
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return False
    try:
        splits = [str(name) for name in json.loads(file.read_bytes())["splits"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{shown(file)} is damaged: save the dataset again with its save_to_disk") from None
    for name in splits:
        if not (folder / name).is_dir():
            raise ValueError(f"{shown(folder / name)} is missing, and {shown(file)} names it: copy the whole folder")
    return True


def table_pieces(path: Path, size: int) -> list[Place]:
    """Row groups of Parquet, or rows of Arrow, as ranges of about `size` bytes."""
    arrow = _arrow(path)
    try:
        return list(_row_groups(path) if suffix_of(path) == ".parquet" else _row_ranges(path, size))
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def table_rows(path: Path, begin: int, end: int, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows, without what is null in them, of those columns that there are."""
    arrow = _arrow(path)
    try:
        table = _groups(path, begin, end, columns) if suffix_of(path) == ".parquet" else _stream(path)[begin:end]
        rows = table.select([name for name in columns if name in table.column_names]).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    rows = rows or [{}] * table.num_rows
    return ({key: value for key, value in row.items() if value is not None} for row in rows)


def _row_groups(path: Path) -> Iterator[Place]:
    from pyarrow import parquet  # noqa: PLC0415 - an extra

    with _opened(path) as data, parquet.ParquetFile(data) as file:
        first = 1
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            yield index, index + 1, first, group.total_byte_size
            first += group.num_rows


def _groups(path: Path, begin: int, end: int, columns: tuple[str, ...]) -> Any:
    from pyarrow import parquet  # noqa: PLC0415 - an extra

    with _opened(path) as data, parquet.ParquetFile(data) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        return file.read_row_groups(range(begin, end), columns=there, use_threads=False)


def _row_ranges(path: Path, size: int) -> Iterator[Place]:
    table = _stream(path)
    each = max(1, table.num_rows * size // max(1, table.nbytes))
    for begin in range(0, table.num_rows, each):
        end = min(begin + each, table.num_rows)
        yield begin, end, begin + 1, table.nbytes * (end - begin) // table.num_rows


def _stream(path: Path) -> Any:
    """The table of an Arrow stream, mapped and not read."""
    arrow = _arrow(path)
    return arrow.ipc.open_stream(arrow.memory_map(os.fsencode(path))).read_all()


def _opened(path: Path) -> Any:
    """By the name's bytes: pyarrow takes no text that is no UTF-8."""
    return _arrow(path).OSFile(os.fsencode(path))


def _arrow(path: Path) -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{shown(path)} needs pyarrow to be read: pip install 'eulerstack[data]'")
    import pyarrow  # noqa: PLC0415 - an extra
    import pyarrow.ipc  # noqa: PLC0415

    return pyarrow


def _damaged(path: Path, error: Exception) -> ValueError:
    kind = "Parquet" if suffix_of(path) == ".parquet" else "the Arrow stream that datasets saves"
    return ValueError(f"{shown(path)} cannot be read as {kind}, it is damaged or something else: {error}")
