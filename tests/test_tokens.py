"""Every kind of tokenizer.json: whole texts, streams that are what `decode` gives, and a name for each id."""

import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

import eulerstack as es
from eulerstack import detokenizer
from eulerstack.detokenizer import CONTEXT, RUN
from eulerstack.spec import HFTokenizer
from eulerstack.tokens import Bytes, HuggingFace, check_fits, document_ids

from .tokenizer_files import KINDS, TEXTS, Kind, byte_fallback, byte_level, numbered, words

CHARACTERS = "é漢🙂a \N{REPLACEMENT CHARACTER}"
SCRAPS = [b"\xc3", b"\x80", b"\xe6\xbc", b"\xf0\x9f\x98", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5", b"A"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def tokenizer(kind: Kind, tmp_path: Path) -> HuggingFace:
    return kind.saved(tmp_path)


def byte_ids(backend: Tokenizer) -> list[int]:
    """The id of each byte, where the vocabulary has bytes."""
    letters = {byte: letter for letter, byte in detokenizer.BYTE_OF_LETTER.items()}
    found = [backend.token_to_id(f"<0x{byte:02X}>") or backend.token_to_id(letters[byte]) for byte in range(256)]
    return [] if None in found else found


def drawn(backend: Tokenizer, size: int, count: int) -> Iterator[list[int]]:
    """Any ids, holes and ids without a token among them; and bytes, whole characters and scraps of them."""
    dice, bytes_ = random.Random(0), byte_ids(backend)
    for _ in range(count):
        ids: list[int] = []
        for _ in range(dice.randrange(12)):
            scrap = dice.choice([*SCRAPS, *(letter.encode() for letter in CHARACTERS)])
            ids += [bytes_[byte] for byte in scrap] if bytes_ and dice.random() < 0.8 else [dice.randrange(size + 3)]
        yield ids
    for byte in range(256 if bytes_ else 0):
        yield [bytes_[byte]]


def test_a_text_is_all_its_tokens_and_nothing_beside_them(kind: Kind, tokenizer: HuggingFace) -> None:
    backend, (bos, eos) = kind.make(), kind.ends()
    for text in [*TEXTS, "the " * 500]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == [*bos, *ids]
        assert document_ids(tokenizer, text) == [*bos, *ids, *eos]


def test_a_stream_joined_is_what_decode_gives(kind: Kind, tokenizer: HuggingFace) -> None:
    for ids in [*drawn(kind.make(), tokenizer.vocab_size, 80), *map(tokenizer.encode, TEXTS)]:
        assert "".join(tokenizer.stream(iter(ids))) == tokenizer.decode(ids) == kind.decoded(ids), ids


def test_what_follows_a_prompt_is_what_it_adds_to_the_text(kind: Kind, tokenizer: HuggingFace) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        for cut in range(1, len(ids)):
            before = tokenizer.decode(ids[:cut]).rstrip("\N{REPLACEMENT CHARACTER}")
            if whole.startswith(before) and (piece := "".join(tokenizer.stream(iter(ids[cut:]), ids[:cut]))):
                assert whole.endswith(piece) and len(whole) - len(piece) >= len(before) - 1


def test_a_copy_in_a_checkpoint_is_the_same_tokenizer(kind: Kind, tokenizer: HuggingFace, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    copy = HuggingFace(kind.contract(Path("nowhere")), tmp_path / "copy")
    assert copy.fingerprint() == tokenizer.fingerprint() and copy.vocab_size == tokenizer.vocab_size
    backend = Tokenizer.from_file(str(tmp_path / "copy" / "tokenizer.json"))
    assert backend.truncation is None and backend.padding is None


def test_distinct_ids_have_distinct_names(tokenizer: HuggingFace) -> None:
    names = [tokenizer.name(token) for token in range(tokenizer.vocab_size + 20)]
    assert len({*names}) == len(names) and all(names)
    assert len({Bytes().name(token) for token in range(300)}) == 300


def test_ids_fit_a_model_with_a_row_for_the_largest(kind: Kind, tokenizer: HuggingFace) -> None:
    size = max(kind.make().get_vocab().values()) + 1
    check_fits(tokenizer, size)
    with pytest.raises(ValueError, match=rf"model.vocab_size = {size - 1} .*; write vocab_size: {size}$"):
        check_fits(tokenizer, size - 1)


def test_tokens_are_decoded_a_few_times_each(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, decoded = detokenizer._decoder_of, 0

    def counted(parts: list[dict[str, Any]]) -> Callable[[Sequence[str]], str]:
        decode = made(parts)

        def count(given: Sequence[str]) -> str:
            nonlocal decoded
            decoded += sum(map(len, given))
            return decode(given)

        return count

    monkeypatch.setattr(detokenizer, "_decoder_of", counted)
    tokenizer, dice = kind.saved(tmp_path), random.Random(0)
    ids = [dice.randrange(tokenizer.vocab_size) for _ in range(3000)]
    list(tokenizer.stream(iter(ids)))
    assert decoded <= 4 * sum(len(word or "") for word in map(tokenizer.backend.id_to_token, ids))


# --- bytes that fall back


@pytest.fixture
def fallback(tmp_path: Path) -> HuggingFace:
    return Kind(lambda: byte_fallback(decoders.Strip(" ", 1, 0))).saved(tmp_path)


def of_bytes(fallback: HuggingFace, data: bytes) -> list[int]:
    return [fallback.backend.token_to_id(f"<0x{byte:02X}>") for byte in data]


def test_a_character_in_bytes_is_shown_when_its_run_ends(fallback: HuggingFace) -> None:
    a = fallback.backend.token_to_id("a")
    assert list(fallback.stream(iter([*of_bytes(fallback, "é".encode()), a]))) == ["", "", "éa", ""]
    assert list(fallback.stream(iter(of_bytes(fallback, b"\xe6\xbc")))) == ["", "", "\ufffd\ufffd"]


def test_a_broken_run_is_shown_at_once(fallback: HuggingFace) -> None:
    assert list(fallback.stream(iter(of_bytes(fallback, b"A\xff\x80")))) == ["", "\ufffd\ufffd", "\ufffd", ""]


def test_of_a_long_run_characters_are_shown_before_it_ends(fallback: HuggingFace) -> None:
    ids = of_bytes(fallback, ("漢字" * RUN).encode())
    pieces = list(fallback.stream(iter(ids)))
    assert "".join(pieces) == "漢字" * RUN
    waits = [len(some) for some in "".join("." if not piece else "|" for piece in pieces).split("|")]
    assert max(waits) <= RUN
    shown = "".join(fallback.stream(iter([*ids, *of_bytes(fallback, b"\xff")])))
    assert shown.startswith("漢字" * (RUN // 2)) and shown.endswith("\ufffd")


@pytest.mark.parametrize("before", ["", "the ", "字" * 20, "the" + "é" * 20])
@pytest.mark.parametrize("letter", ["é", "漢", "🙂"])
def test_a_character_that_a_prompt_began_in_bytes_is_ended(fallback: HuggingFace, before: str, letter: str) -> None:
    prompt = of_bytes(fallback, before.encode()) if before.startswith("字") else fallback.encode(before or "a")
    for cut in range(1, len(letter.encode())):
        first, second = letter.encode()[:cut], letter.encode()[cut:]
        ids = [*prompt, *of_bytes(fallback, first)]
        assert "".join(fallback.stream(iter(of_bytes(fallback, second + b"!")), ids)) == letter + "!"


def test_a_prompt_in_bytes_is_not_said_again(fallback: HuggingFace) -> None:
    ids = of_bytes(fallback, ("é" * CONTEXT).encode())
    assert "".join(fallback.stream(iter(of_bytes(fallback, "è".encode())), ids)) == "è"
    assert "".join(fallback.stream(iter(of_bytes(fallback, b"\x80a")), ids)) == "\ufffd\ufffd"


def test_the_space_before_a_word_that_follows_a_prompt_is_said(fallback: HuggingFace) -> None:
    the = fallback.backend.token_to_id("\u2581the")
    assert fallback.decode([the, the]) == "the the"
    assert "".join(fallback.stream(iter([the]), [the])) == " the"


def test_spaces_at_the_end_wait_for_what_comes(tmp_path: Path) -> None:
    tokenizer = Kind(lambda: byte_fallback(decoders.Strip(" ", 1, 1))).saved(tmp_path)
    space, a = map(tokenizer.backend.token_to_id, "\u2581a")
    assert list(tokenizer.stream(iter([space, a, space, space, a, space]))) == ["", "a", "", " ", " a", "", ""]
    assert tokenizer.decode([space, space]) == tokenizer.decode([space]) == tokenizer.decode([]) == ""


# --- what is not shown, holes, names, what cannot be encoded


@pytest.mark.parametrize("special", [True, False])
def test_bos_and_eos_are_not_shown_whether_marked_special_or_not(tmp_path: Path, special: bool) -> None:
    tokenizer = Kind(lambda: byte_level(special=special), bos=True, eos=True).saved(tmp_path)
    (bos, *ids), eos = tokenizer.encode("the cat"), next(iter(tokenizer.stops))
    assert tokenizer.decode([bos, *ids, eos]) == "".join(tokenizer.stream(iter([bos, *ids, eos]))) == "the cat"
    assert tokenizer.name(bos) == "<s>" and tokenizer.name(eos) == "</s>"


def test_ids_in_holes_have_no_text_and_a_name(tmp_path: Path) -> None:
    tokenizer = Kind(lambda: words(far=300)).saved(tmp_path)
    assert tokenizer.vocab_size == 301
    assert tokenizer.decode([3, 200, 300, 10**6, 4]) == "the far cat"
    assert tokenizer.name(200) == "token:200" and tokenizer.name(10**6) == "token:1000000"


def test_names_are_what_a_token_adds_to_a_text(tmp_path: Path) -> None:
    tokenizer = Kind(lambda: byte_fallback(decoders.Strip(" ", 1, 0))).saved(tmp_path)
    ids = ["<s>", "\u2581the", "the", "A", "<0x41>", "<0x0A>", "<0xE6>"]
    names = ["<s>", " the", "the", "A", "<0x41>", "\n", "<0xE6>"]
    assert [tokenizer.name(tokenizer.backend.token_to_id(one)) for one in ids] == names


def test_no_token_takes_the_name_of_a_number(tmp_path: Path) -> None:
    known = numbered("token:3", "a", "token:1") | {"b": 4}
    tokenizer = Kind(lambda: Tokenizer(models.WordLevel(known, "a"))).saved(tmp_path)
    tokenizer.backend.decoder = decoders.Fuse()
    assert [tokenizer.name(token) for token in range(5)] == ["token:0", "a", "token:2", "token:3", "b"]


def test_the_fingerprint_of_an_ordinary_file_is_what_it_was(tmp_path: Path) -> None:
    """So caches and streams that were made before are found; those made of cut texts are not."""
    ordinary = Kind(words).saved(tmp_path).fingerprint()
    as_read = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str()
    assert ordinary == sha256(f"{as_read}{{}}".encode()).hexdigest()
    for alter in (lambda b: b.enable_truncation(8), lambda b: b.enable_padding(length=9)):
        assert Kind(words, alters=alter).saved(tmp_path).fingerprint() == ordinary


@pytest.mark.parametrize("text", ["", " ", "\ud800", "a\udcffb", "\ud83d\ude42", "<s>the", "</s>", "\x00"])
def test_any_text_is_encoded(kind: Kind, tokenizer: HuggingFace, text: str) -> None:
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.encode(text) == [*kind.ends()[0], *kind.make().encode(clean, add_special_tokens=False).ids]


def test_surrogates_become_bytes_or_u_fffd() -> None:
    assert Bytes().decode(Bytes().encode("a\ud800b\udcff")) == "a\ufffdb\ufffd"
    assert Bytes().encode("\udcff") == [255]


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0}), models.Unigram([("a", -1.0)])])
def test_a_text_that_no_token_knows_is_refused_in_a_sentence(tmp_path: Path, model: Any) -> None:
    tokenizer = Kind(lambda: Tokenizer(model)).saved(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode 'xyz': .*; give it a token for unknowns"):
        tokenizer.encode("xyz")


def test_a_file_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokens; train the tokenizer first"):
        Kind(lambda: Tokenizer(models.BPE())).saved(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        es.tokenizer_of(HFTokenizer(type="hf", pretrained=str(tmp_path)))
