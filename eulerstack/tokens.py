"""Text to token ids and back: the 256 bytes, or a Hugging Face tokenizer.json."""

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from .spec import ByteTokenizer, HFTokenizer


class Tokenizer(Protocol):
    """ids in [0, vocab_size)."""

    vocab_size: int
    begins: bool  # whether a document starts with BOS
    stops: frozenset[int]  # ids that end a text

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Pieces of text as the ids come, never half a character."""

    def name(self, token: int) -> str:
        """What one id is called: its text, or a word of its own where it is only part of a character."""

    def fingerprint(self) -> str:
        """Changes whenever the same text could give other ids."""

    def save(self, folder: Path) -> None:
        """Write what the tokenizer needs besides the spec."""


class Bytes:
    """UTF-8 bytes; what is no UTF-8, or no byte, decodes to U+FFFD."""

    vocab_size = 256
    begins = False
    stops: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, ids: list[int]) -> str:
        return "".join(self.stream(iter(ids)))

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            yield decoder.decode(bytes([token if token < 256 else 0xFF]))
        yield decoder.decode(b"", final=True)

    def name(self, token: int) -> str:
        return chr(token) if token < 128 else f"bytes:\\x{token:02x}" if token < 256 else f"token:{token}"

    def fingerprint(self) -> str:
        return "bytes"

    def save(self, folder: Path) -> None:
        """Nothing: the spec says it all."""


class HuggingFace:
    """A tokenizer.json read by the `tokenizers` library; BOS and EOS as the contract says."""

    def __init__(self, contract: HFTokenizer, folder: Path | None = None) -> None:
        from tokenizers import Tokenizer as Backend  # noqa: PLC0415 - most stacks speak bytes

        self.file = _tokenizer_file(contract.pretrained, folder)
        self.contract = contract
        try:
            self.backend: Any = Backend.from_file(str(self.file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{self.file} is no tokenizer.json: {error}") from None
        self.vocab_size: int = self.backend.get_vocab_size()
        wanted = (("bos", contract.add_bos), ("eos", contract.add_eos))
        self._special = {name: self._find(name) for name, add in wanted if add}
        self.begins = contract.add_bos
        self.stops = frozenset({self._special["eos"]} if contract.add_eos else ())

    def encode(self, text: str) -> list[int]:
        """The text's ids after BOS; EOS is for whole documents, see document_ids."""
        text = text.encode("utf-8", "replace").decode()
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return [self._special["bos"], *ids] if self.contract.add_bos else ids

    def decode(self, ids: list[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream  # noqa: PLC0415

        decoder = DecodeStream(skip_special_tokens=True)
        for token in ids:
            yield decoder.step(self.backend, token) or ""

    def name(self, token: int) -> str:
        text: str = self.backend.decode([token], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else self.backend.id_to_token(token) or f"token:{token}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.backend.to_str().encode())  # the same for the copy that a checkpoint has
        digest.update(repr(self._special).encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        self.backend.save(str(folder / "tokenizer.json"))

    def _find(self, name: str) -> int:
        names = {
            "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
            "eos": ("</s>", "<|end_of_text|>", "<eos>", "[EOS]"),
        }
        for token in (*names[name], "<|endoftext|>"):
            found: int | None = self.backend.token_to_id(token)
            if found is not None:
                return found
        raise ValueError(
            f"tokenizer_contract.add_{name} is true, but {self.file} has none of {', '.join(names[name])}; set it false"
        )


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a whole document, with EOS where the contract asks for it."""
    return [*tokenizer.encode(text), *tokenizer.stops]


def tokenizer_of(contract: ByteTokenizer | HFTokenizer, folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a stack; a checkpoint's own tokenizer.json in `folder` comes first. Raises ValueError."""
    return Bytes() if isinstance(contract, ByteTokenizer) else HuggingFace(contract, folder)


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError where the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size = {vocab_size} is less than the tokenizer's {tokenizer.vocab_size}; "
            f"write vocab_size: {tokenizer.vocab_size}"
        )


def _tokenizer_file(pretrained: str, folder: Path | None) -> Path:
    given = Path(pretrained)
    places = [given, given / "tokenizer.json"]
    if folder is not None:
        places.insert(0, folder / "tokenizer.json")
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"tokenizer_contract.pretrained = {pretrained!r} is no tokenizer.json and no folder with one; "
        "download the tokenizer and give its path (nothing is downloaded for you)"
    )


class Cut:
    """Text up to the first of the `stops`, piece by piece; an end that might become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.met = stops, "", False

    def __call__(self, piece: str) -> str:
        """What can be shown now; `met` says whether a stop came."""
        text = self.held + piece
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        ends = (n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n]))
        end = min(found) if found else len(text) - max(ends, default=0)
        self.met, self.held = bool(found), "" if found else text[end:]
        return text[:end]


def until(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces of a text up to the first of the `stops`."""
    cut = Cut(stops)
    for piece in pieces:
        yield cut(piece)
        if cut.met:
            return
    yield cut.held
