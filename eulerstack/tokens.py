"""Text to token ids and back: the 256 bytes, or a Hugging Face tokenizer.json."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from .detokenizer import LOST, ByteDetokenizer, Detokenizer, StagedDetokenizer, gone_on
from .paths import expand_home
from .spec import ByteTokenizer, HFTokenizer, StackSpec


class Tokenizer(Protocol):
    """ids in [0, vocab_size), of which some may stand for nothing."""

    vocab_size: int  # the largest id, and one
    begins: bool  # whether a document starts with BOS
    stops: frozenset[int]  # ids that end a text

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def stream(self, ids: Iterator[int], before: Sequence[int] = ()) -> Iterator[str]:
        """Pieces of text as the ids come, never half a character; joined, they are what `decode` gives.

        before: the ids of a prompt that they go on from, whose own text is not among the pieces.
        """

    def detokenizer(self, before: Sequence[int] = ()) -> Detokenizer:
        """What `stream` gives the ids to, one at a time."""

    def name(self, token: int) -> str:
        """What one id alone is called: its text, or a word of its own where another has that text, or there is none."""

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
        """A byte that a terminal or file name brought as a surrogate is that byte; other surrogates are U+FFFD."""
        return list(_NO_BYTE.sub(LOST, text).encode("utf-8", "surrogateescape"))

    def decode(self, ids: list[int]) -> str:
        return "".join(self.stream(iter(ids)))

    def stream(self, ids: Iterator[int], before: Sequence[int] = ()) -> Iterator[str]:
        return _pieces(self.detokenizer(before), ids)

    def detokenizer(self, before: Sequence[int] = ()) -> Detokenizer:
        return gone_on(ByteDetokenizer(), before)

    def name(self, token: int) -> str:
        return chr(token) if token < 128 else f"bytes:\\x{token:02x}" if token < 256 else f"token:{token}"

    def fingerprint(self) -> str:
        return "bytes"

    def save(self, folder: Path) -> None:
        """Nothing: the spec says it all."""


_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def _pieces(detokenizer: Detokenizer, ids: Iterator[int]) -> Iterator[str]:
    for token in ids:
        yield detokenizer.put(token).text
    yield detokenizer.end().text


class HuggingFace:
    """A tokenizer.json read by the `tokenizers` library; BOS and EOS as the contract says.

    What the file says of truncation, padding and BPE's dropout is for others: a text's ids are all of it, nothing
    beside it, and the same each time.
    """

    def __init__(self, contract: HFTokenizer, folder: str | Path | None = None) -> None:
        self.file = _tokenizer_file(contract.pretrained, folder)
        self.contract = contract
        self.backend = _read(self.file)
        self.vocab_size: int = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise ValueError(f"{self.file} has no tokens; train the tokenizer first")
        wanted = (("bos", contract.add_bos), ("eos", contract.add_eos))
        self._special = {name: self._find(name) for name, add in wanted if add}
        self.begins = contract.add_bos
        self.stops = frozenset({self._special["eos"]} if contract.add_eos else ())
        added = self.backend.get_added_tokens_decoder().values()
        marked = {token.content for token in added if token.special}
        self._unshown = marked | {self.backend.id_to_token(token) for token in self._special.values()}

    def encode(self, text: str) -> list[int]:
        """The text's ids after BOS; EOS is for whole documents, see document_ids. Raises ValueError for a text of
        which the file knows a part by no token, nor by one for what it does not know."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{self.file} cannot encode {text!r:.80}: {error}; give it a token for unknowns") from None
        return [self._special["bos"], *ids] if self.contract.add_bos else ids

    def decode(self, ids: list[int]) -> str:
        """Special tokens, BOS and EOS are not shown, nor ids that stand for nothing."""
        return "".join(self.stream(iter(ids)))

    def stream(self, ids: Iterator[int], before: Sequence[int] = ()) -> Iterator[str]:
        return _pieces(self.detokenizer(before), ids)

    def detokenizer(self, before: Sequence[int] = ()) -> Detokenizer:
        return gone_on(StagedDetokenizer(self._shown, self.backend.decoder), before)

    def name(self, token: int) -> str:
        return self._names[token] if token < self.vocab_size else f"token:{token}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.backend.to_str().encode())  # the same for the copy that a checkpoint has
        digest.update(repr(self._special).encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        self.backend.save(str(folder / "tokenizer.json"))

    def _shown(self, token: int) -> str | None:
        """A token as the vocabulary writes it; None for one without text."""
        word: str | None = self.backend.id_to_token(token)
        return None if word in self._unshown else word

    @cached_property
    def _names(self) -> list[str]:
        """A name for each id, made when the first is asked for. It is what the id adds to a text, where no other adds
        that or is written so in the vocabulary; else what the vocabulary writes; else its number."""
        ids, taken, names = self.backend.get_vocab(with_added_tokens=True), set[str](), list[str]()
        for token in range(self.vocab_size):
            word = self.backend.id_to_token(token)
            text = self._added_text(word) if self._shown(token) is not None else ""
            free = text and LOST not in text and ids.get(text, token) == token
            found = (name for name in (text if free else None, word) if name and name not in taken)
            name = next((name for name in found if not _NUMBERED.fullmatch(name)), f"token:{token}")
            taken.add(name)
            names.append(name)
        return names

    def _added_text(self, word: str) -> str:
        """What a token adds to a text that it does not begin."""
        before = "b" if word == "a" else "a"
        decode: Callable[[list[str]], str] = " ".join if self.backend.decoder is None else self.backend.decoder.decode
        return decode([before, word])[len(decode([before])) :]

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


_NUMBERED = re.compile(r"token:\d+")
"""A name that only the id of that number has."""


def _read(file: Path) -> Any:
    """The library's tokenizer. Raises ValueError."""
    from tokenizers import Tokenizer as Backend  # noqa: PLC0415 - most stacks speak bytes
    from tokenizers.models import BPE  # noqa: PLC0415

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer.json: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, BPE):
        backend.model.dropout = None
    return backend


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a whole document, with EOS where the contract asks for it."""
    return [*tokenizer.encode(text), *tokenizer.stops]


def tokenizer_of(contract: ByteTokenizer | HFTokenizer, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a stack; a checkpoint's own tokenizer.json in `folder` comes first. Raises ValueError."""
    return Bytes() if isinstance(contract, ByteTokenizer) else HuggingFace(contract, folder)


def tokenizer_for(spec: StackSpec, folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's stack. Raises ValueError where its ids are more than the stack's rows."""
    tokenizer = tokenizer_of(spec.tokenizer_contract, folder)
    check_fits(tokenizer, spec.model.vocab_size)
    return tokenizer


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError where the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size = {vocab_size} is less than the tokenizer's {tokenizer.vocab_size}; "
            f"write vocab_size: {tokenizer.vocab_size}"
        )


def _tokenizer_file(pretrained: str, folder: str | Path | None) -> Path:
    given = expand_home(pretrained)
    places = [given, given / "tokenizer.json"]
    if folder is not None:
        places.insert(0, expand_home(folder) / "tokenizer.json")
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
