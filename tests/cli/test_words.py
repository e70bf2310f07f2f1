"""Repeats: what is drawn once stands for all, and nothing is lost."""

import random

import pytest

import eulerstack as es
from eulerstack.cli.words import in_bytes, pattern, repeats, short

LINES = {
    "mmma" * 8: "8[mmma]",
    "m" * 5: "5[m]",
    "mrmrma" * 5 + "mr": "5[mrmrma] 1[mr]",
    "abc": "1[abc]",
    "ma": "1[ma]",
    "ammammab": "2[amm] 1[ab]",
}


def written(text: str) -> str:
    return " ".join(f"{part.times}[{''.join(part.items)}]" for part in repeats(text, str))


@pytest.mark.parametrize("text", LINES)
def test_repeats_are_found(text: str) -> None:
    assert written(text) == LINES[text]


def test_repeats_say_all_layers_again() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("ma") for _ in range(draw.randint(1, 40)))
        assert "".join("".join(part.items) * part.times for part in repeats(text, str)) == text


def test_a_stack_in_a_line() -> None:
    assert pattern(es.expand(es.load("arch_expert_research_mini"))) == "2 x [mamba2 retnet], mamba2, attention"
    b = es.StackBuilder(d_model=32, n_heads=2)
    for _ in range(3):
        b.add("mamba", repeat=6).add("attention", {"window": 8}, ffn={"type": "moe"})
    assert pattern(es.expand(b.spec())) == "3 x [6 x mamba2, attention(8)+moe]"
    b.add("retnet", repeat=2)
    assert pattern(es.expand(b.spec())) == "3 x [6 x mamba2, attention(8)+moe], 2 x retnet"


def test_figures_have_three_digits() -> None:
    assert [short(n, "TBMk") for n in (1_340_000_000, 999, 12_300)] == ["1.34 B", "999 ", "12.3 k"]
    assert [in_bytes(n) for n in (100, 2048, 13 << 20, 3 << 30)] == ["100 B", "2 KiB", "13 MiB", "3 GiB"]
