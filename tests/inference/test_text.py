"""Tokens as text: whole characters, stops, and where in the text a token stands."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eulerstack.inference.text import Text
from eulerstack.tokens import Bytes, Cut, HuggingFace, Tokenizer

from ..tokenizer_files import KINDS, Kind, byte_fallback

HALVES = st.lists(
    st.one_of(st.integers(0, 300), st.sampled_from([*"é€🙂\N{REPLACEMENT CHARACTER}".encode()])), max_size=40
)


def said(tokenizer: Tokenizer, tokens: list[int], stops: list[str] | None = None) -> tuple[str, list[int]]:
    text, shown = Text(tokenizer, stops or []), ""
    for token in tokens:
        shown += text.add(token)
        if text.cut.met:
            return shown, text.offsets
    return shown + text.end(), text.offsets


@given(HALVES)
def test_a_byte_stands_at_the_character_that_it_is_part_of(tokens: list[int]) -> None:
    raw = bytes(token if token < 256 else 0xFF for token in tokens)
    assert said(Bytes(), tokens) == (
        raw.decode(errors="replace"),
        [len(raw[: i + 1].decode(errors="replace")) - 1 for i in range(len(raw))],
    )


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    """Pairs of bytes: pieces that are words, and pieces that are parts of characters."""
    return KINDS["byte level, BOS and EOS"].saved(tmp_path_factory.mktemp("bpe"))


@given(text=st.lists(st.sampled_from("the cat é€🙂 ñandú, x漢"), max_size=30).map("".join))
def test_pieces_of_words_stand_where_their_characters_do(bpe: HuggingFace, text: str) -> None:
    tokens = bpe.encode(text)
    shown, offsets = said(bpe, tokens)
    assert shown == text
    wholes = [bpe.decode(tokens[:i]).rstrip("\N{REPLACEMENT CHARACTER}") for i in range(len(tokens))]
    assert offsets == [len(whole) for whole in wholes]


def test_names_tell_pieces_of_characters_apart(bpe: HuggingFace) -> None:
    names = [bpe.name(token) for token in range(bpe.vocab_size)]
    assert len(set(names)) == len(names)
    assert {"<s>", " the", " cat"} <= set(names)
    assert bpe.name(10**6) == "token:1000000"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_and_shows_no_part_of_it(text: str, stops: list[str]) -> None:
    cut, shown, wanted = Cut(stops), "", text
    for i, letter in enumerate(text):
        shown += cut(letter)
        met = [text[: i + 1].find(stop) for stop in stops if stop in text[: i + 1]]
        assert cut.met == bool(met)
        if met:
            wanted = text[: min(met)]
            break
    assert shown + cut.held == wanted


def test_a_prompt_that_ends_in_half_a_character_is_gone_on_with() -> None:
    text = Text(Bytes(), before="é".encode()[:1])
    assert text.add("é".encode()[1]) == "é" and text.offsets == [0]


def test_a_token_in_bytes_stands_where_its_character_does_or_its_own_sign(tmp_path: Path) -> None:
    fallback = Kind(byte_fallback).saved(tmp_path)
    tokens = [fallback.backend.token_to_id(f"<0x{byte:02X}>") for byte in "é漢".encode()]
    a, bos = map(fallback.backend.token_to_id, ("a", "<s>"))
    assert said(fallback, [bos, a, *tokens, bos, a]) == ("aé漢a", [0, 0, 1, 1, 2, 2, 2, 3, 3])
    assert said(fallback, [a, *tokens[:4], a]) == ("a\ufffd\ufffd\ufffd\ufffda", [0, 1, 2, 3, 4, 5])
    text = Text(fallback, before=[a, *tokens[:3]])
    assert [text.add(token) for token in [*tokens[3:], bos, a]] == ["", "", "", "漢a"]
    assert text.offsets == [0, 0, 1, 1]


@pytest.mark.parametrize(("token", "name"), [(65, "A"), (0xE2, "bytes:\\xe2"), (300, "token:300")])
def test_names_of_bytes(token: int, name: str) -> None:
    assert Bytes().name(token) == name
