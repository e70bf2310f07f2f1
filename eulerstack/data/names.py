"""Files by their names: which kinds are read, which are refused, and names as text that can be printed."""

from pathlib import Path, PurePath

TABLES = (".parquet", ".arrow")
LINES = (".jsonl", ".ndjson", ".jsonlines")

_LEAVE = "leave it out (data.pattern picks files, as in '*.txt')"
_ROWS = 'write its rows as .jsonl, an object {"text": ...} a line, or as .parquet'
_TO_DO = {
    f"is compressed and is not read: unpack it, or {_LEAVE}": (
        ".gz .tgz .bz2 .tbz .tbz2 .xz .txz .lzma .zst .zstd .lz4 .br .zip .7z .rar .tar"
    ),
    f"is a table of a kind that is not read: {_ROWS}, or {_LEAVE}": (
        ".csv .tsv .psv .xls .xlsx .ods .orc .avro .feather .tfrecord .h5 .hdf5 .sqlite .sqlite3 .db .lance .mdb"
    ),
    f"holds numbers and no text: {_LEAVE}": (
        ".bin .idx .npy .npz .pt .pth .ckpt .safetensors .gguf .onnx .pkl .pickle .joblib .msgpack .mmap"
    ),
    f"is a document that is not read: save it as .txt in UTF-8, or {_LEAVE}": (
        ".pdf .doc .docx .odt .epub .mobi .ppt .pptx .odp .djvu"
    ),
    f"is a picture, a sound or a film and no text: {_LEAVE}": (
        ".png .jpg .jpeg .gif .bmp .tif .tiff .webp .ico .heic .mp3 .wav .flac .ogg .opus .m4a .mp4 .mkv .avi .mov"
    ),
    f"is a program or a part of one and no text: {_LEAVE}": (
        ".exe .dll .so .dylib .o .class .jar .pyc .pyo .pyd .whl .egg .deb .rpm .wasm .iso .dmg"
    ),
}  # fmt: skip
_REFUSED = {suffix: text for text, suffixes in _TO_DO.items() for suffix in suffixes.split()}


def suffix_of(path: Path) -> str:
    """In small letters: A.JSONL is what a.jsonl is."""
    return path.suffix.lower()


def name_bytes(name: str | PurePath) -> bytes:
    """The bytes that the system gave for a name, of whatever encoding they are."""
    return str(name).encode("utf-8", "surrogateescape")


def shown(name: str | PurePath) -> str:
    """The name as text; what is no UTF-8 in it becomes U+FFFD."""
    return name_bytes(name).decode("utf-8", "replace")


def check_kind(path: Path) -> None:
    """Raises ValueError for a file whose name says that it is no text, nor a table that is read."""
    refused = _REFUSED.get(suffix_of(path))
    if refused is not None:
        raise ValueError(f"{shown(path)} {refused}")
