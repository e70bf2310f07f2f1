"""Generation through the state equals generation by recomputing everything."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import eulerstack as es
from eulerstack.inference import generate as module
from eulerstack.inference.engine import Engine
from eulerstack.inference.sampling import Sampler, Sampling, Token
from eulerstack.spec import HFTokenizer
from eulerstack.tokens import Bytes, until

from ..conftest import close

Build = Callable[..., es.Stack]


def written(model: es.Stack, prompts: list[list[int]], count: int, **options: object) -> list[list[int]]:
    steps = list(es.generate(model, prompts, count, **options))  # type: ignore[arg-type]
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]  # type: ignore[misc]


def recomputed(model: es.Stack, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [200], [40, 50, 60]]


def test_greedy_equals_recomputing_alone_and_in_a_ragged_batch(
    build_mini: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_mini()
    wanted = [recomputed(model, prompt, 30) for prompt in PROMPTS]
    assert written(model, PROMPTS, 30, temperature=0) == wanted
    assert [written(model, [p], 30, temperature=0)[0] for p in PROMPTS] == wanted
    monkeypatch.setattr(module, "PREFILL", 3)
    assert written(model, PROMPTS, 30, temperature=0) == wanted


def test_prefill_gives_each_rows_last_logits(build_mini: Build) -> None:
    model = build_mini()
    with torch.no_grad():
        logits, state = module.prefill(model, PROMPTS, room=3)
        for row, prompt in enumerate(PROMPTS):
            close(logits[row], model.parallel(torch.tensor([prompt]))[0, -1], 1e-12)
    assert state.length.tolist() == [11, 1, 3]


def test_seeds_and_samplers(build_mini: Build) -> None:
    model = build_mini(torch.float32)
    one = written(model, PROMPTS, 20, seed=3)
    assert one == written(model, PROMPTS, 20, seed=3)
    assert one != written(model, PROMPTS, 20, seed=4)
    greedy = written(model, PROMPTS, 20, temperature=0)
    assert written(model, PROMPTS, 20, top_k=1, seed=0) == greedy
    assert written(model, PROMPTS, 20, top_p=1e-9, seed=0) == greedy


LOGITS = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
SHARE = LOGITS.softmax(-1)
CUTS = {
    "nothing": ({}, [0, 1, 2, 3, 4]),
    "all of it": ({"top_p": 1.0, "top_k": 5, "min_p": 0.0}, [0, 1, 2, 3, 4]),
    "top_k": ({"top_k": 3}, [0, 1, 2]),
    "top_p": ({"top_p": float(SHARE[:2].sum()) - 1e-3}, [0, 1]),
    "top_p of what top_k left": ({"top_k": 2, "top_p": float(SHARE[0] / SHARE[:2].sum()) - 1e-3}, [0]),
    "min_p": ({"min_p": float(SHARE[2] / SHARE[0]) - 1e-3}, [0, 1, 2]),
    "temperature, then min_p": ({"temperature": 0.5, "min_p": float(SHARE[2] / SHARE[0]) - 1e-3}, [0, 1]),
}


def drawn(count: int, **rules: object) -> torch.Tensor:
    sampler = Sampler(count, 5, torch.device("cpu"))
    for row in range(count):
        sampler.put(row, Sampling(seed=row, **rules))  # type: ignore[arg-type]
    return torch.tensor(sampler(LOGITS.repeat(count, 1), range(count)))


@pytest.mark.parametrize("name", CUTS)
def test_rules_cut_where_they_say_and_keep_the_rest_in_proportion(name: str) -> None:
    rules, left = CUTS[name]
    ids = drawn(3000, **rules)
    wanted = (LOGITS / rules.get("temperature", 1.0)).softmax(-1)[left]
    counts = torch.bincount(ids, minlength=5) / 3000
    assert counts.sum() == counts[left].sum()
    assert (counts[left] - wanted / wanted.sum()).abs().max() < 0.03


def test_a_rows_tokens_do_not_depend_on_the_batch(build_mini: Build) -> None:
    model = build_mini()
    rules = {"seed": 5, "temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3}
    together = written(model, PROMPTS, 20, **rules)
    for row, prompt in enumerate(PROMPTS):
        assert written(model, [prompt], 20, **{**rules, "seed": 5 + row})[0] == together[row]


def test_repetition_is_penalised_in_prompt_and_text() -> None:
    sampler = Sampler(2, 5, torch.device("cpu"))
    sampler.put(0, Sampling(temperature=0, repetition_penalty=2.0), [0])
    logits = torch.tensor([4.0, 3.0, -1.0, -1.5, -9.0]).repeat(2, 1)
    assert sampler(logits, [0, 1]) == [1, 0]  # 4 / 2 < 3
    assert sampler(logits, [0, 1]) == [0, 0]  # 3 / 2 < 4 / 2
    sampler.put(0, Sampling(temperature=0, repetition_penalty=2.0), [2])
    assert sampler(torch.tensor([[-5.0, -5.0, -1.0, -1.5, -9.0]]), [0]) == [3]  # -1 * 2 < -1.5
    sampler.put(0, Sampling(temperature=0))
    assert sampler(logits, [0, 1]) == [0, 0]


def test_logprobs_are_the_models_whatever_the_rules_cut(build_mini: Build) -> None:
    model = build_mini()
    steps = [step[0] for step in es.generate(model, [PROMPTS[0]], 5, seed=0, top_k=1, temperature=0.3, logprobs=3)]
    tokens = torch.tensor([PROMPTS[0] + steps])
    scores = model(tokens)[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    for token, wanted in zip(steps, scores, strict=True):
        assert isinstance(token, Token)
        close(torch.tensor([token.logprob]), wanted[token][None].float(), 1e-6)
        assert list(token.top) == wanted.topk(3).indices.tolist()


def test_stopped_rows_yield_none(build_mini: Build) -> None:
    model = build_mini()
    free = written(model, PROMPTS, 12, temperature=0)
    stop = free[0][4]
    steps = list(es.generate(model, PROMPTS, 12, temperature=0, stop=[stop]))
    first = [step[0] for step in steps]
    at = free[0].index(stop)
    assert first[: at + 1] == free[0][: at + 1]
    assert all(token is None for token in first[at + 1 :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "empty"),
        ({"prompts": [[1], []]}, "empty"),
        ({"prompts": [[256]]}, "ids from 256"),
        ({"prompts": [[-1]]}, "ids from -1"),
        ({"prompts": "def "}, r"'def ' is text: give .*tokenizer_of\(model.spec.tokenizer_contract\).encode\('def '\)"),
        ({"prompts": ["def "]}, "'def ' is text: give"),
        ({"prompts": [["d", "e"]]}, "'d' is text: give"),
        ({"prompts": [1.0, 2.0]}, "1.0 is a float: give whole numbers"),
        ({"prompts": [[1, 2.5]]}, "2.5 is a float: give whole numbers"),
        ({"prompts": np.array([[1.5]])}, "1.5 is a float"),
        ({"prompts": torch.tensor([1.0])}, "1.0 is a float"),
        ({"prompts": torch.tensor([[True]])}, "True is a bool"),
        ({"prompts": np.ones((1, 1, 1), dtype=int)}, r"\[1\] is a list"),
        ({"prompts": [[1], 2]}, "2 is a int"),
        ({"prompts": 7}, "7 is a int"),
        ({"prompts": None}, "None is a NoneType"),
        ({"prompts": {"input_ids": [[1]]}}, "is a dict"),
        ({"stop": "a"}, "stop = 'a' must be token ids"),
        ({"stop": ["a"]}, "must be token ids"),
        ({"max_new_tokens": 2.0}, "max_new_tokens = 2.0 must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 256}, "max_seq_len = 256"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"seed": 1 << 64}, "seed"),
    ],
)
def test_refusals_come_before_the_first_token(build_mini: Build, options: dict[str, object], message: str) -> None:
    given = {"prompts": [[1]], "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        es.generate(build_mini(), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ("def ", {}, "'def ' is text: give"),
        ([1.5], {}, "1.5 is a float"),
        ([], {}, "empty"),
        ([[1], [2]], {}, "2 prompts are given: submit each of them"),
        ([1], {"stop": "a"}, "must be token ids"),
        ([1], {"max_new_tokens": "3"}, "max_new_tokens = '3'"),
    ],
)
def test_an_engine_refuses_them_too(build_mini: Build, prompt: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(build_mini(), 1).submit(prompt, **more)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda ids: [*map(torch.tensor, ids)]])
def test_ids_are_taken_as_people_have_them(build_mini: Build, kind: Callable[[list[Any]], Any]) -> None:
    model, stop = build_mini(), {"temperature": 0, "stop": np.array([300])}
    wanted = written(model, [[1, 2, 3], [4, 5, 6]], 5, temperature=0)
    assert written(model, kind([[1, 2, 3], [4, 5, 6]]), 5, **stop) == wanted
    assert [step[0] for step in es.generate(model, kind([1, 2, 3]), 5, **stop)] == wanted[0]
    assert written(model, kind([[1, 2, 3]]), 5, **stop) == wanted[:1]
    engine = Engine(model, 1)
    request = engine.submit(kind([1, 2, 3]), 5, **stop)
    while not engine.idle:
        engine.step()
    assert request.tokens == wanted[0]


def test_bytes_stream_whole_characters() -> None:
    ids = Bytes().encode("naïve 𝄞")
    pieces = list(Bytes().stream(iter(ids)))
    assert "".join(pieces) == "naïve 𝄞"
    assert "�" not in "".join(pieces)
    assert Bytes().decode([255]) == "�"


@pytest.mark.parametrize("cuts", [[1] * 30, [30], [3, 7, 2, 18]])
@pytest.mark.parametrize(
    ("stops", "wanted"),
    [([], "one, two, tthree, four"), (["three"], "one, two, t"), (["four", "two"], "one, "), (["x", "fourx"], None)],
)
def test_text_ends_before_the_first_stop(cuts: list[int], stops: list[str], wanted: str | None) -> None:
    text = "one, two, tthree, four"
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    assert "".join(until(iter(pieces), stops)) == (text if wanted is None else wanted)


def test_no_part_of_a_stop_is_shown_early() -> None:
    shown = []
    for piece in until(iter(["a<", "en", "d", ">b"]), ["<end>"]):
        shown.append(piece)
    assert "".join(shown) == "a"


def test_a_hugging_face_tokenizer_encodes_decodes_and_streams(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = word_tokenizer(tmp_path)
    tokenizer = es.tokenizer_of(HFTokenizer(type="hf", pretrained=str(tmp_path), add_bos=True))
    ids = tokenizer.encode("the cat sat")
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "the cat sat"

    def stream() -> Iterator[int]:
        yield from ids

    assert "".join(tokenizer.stream(stream())) == "the cat sat"
    with pytest.raises(ValueError, match="add_eos is true"):
        es.tokenizer_of(HFTokenizer(type="hf", pretrained=str(file), add_eos=True))
    with pytest.raises(ValueError, match="nothing is downloaded"):
        es.tokenizer_of(HFTokenizer(type="hf", pretrained="meta/llama"))


def word_tokenizer(folder):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<s>", "▁the", "▁cat", "▁sat", "▁on", "<unk>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
