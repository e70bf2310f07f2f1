"""Generation through the state equals generation by recomputing everything."""

from collections.abc import Callable, Iterator

import pytest
import torch

import eulerstack as es
from eulerstack.inference import generate as module
from eulerstack.spec import HFTokenizer
from eulerstack.tokens import Bytes

from .conftest import close

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


def test_top_k_and_top_p_cut_where_they_say() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(4000, 1)
    share = logits[0].softmax(-1)
    chance = torch.Generator().manual_seed(0)
    drawn = module._Sampler(1.0, 3, None, chance)(logits)
    assert sorted(set(drawn.tolist())) == [0, 1, 2]
    drawn = module._Sampler(1.0, None, float(share[:2].sum()) - 1e-3, chance)(logits)
    assert sorted(set(drawn.tolist())) == [0, 1]
    drawn = module._Sampler(1.0, None, None, chance)(logits)
    frequencies = torch.bincount(drawn, minlength=5) / 4000
    assert (frequencies - share).abs().max() < 0.03


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
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 256}, "max_seq_len = 256"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_refusals_come_before_the_first_token(build_mini: Build, options: dict[str, object], message: str) -> None:
    given = {"prompts": [[1]], "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        es.generate(build_mini(), **given)  # type: ignore[arg-type]


def test_bytes_stream_whole_characters() -> None:
    ids = Bytes().encode("naïve 𝄞")
    pieces = list(Bytes().stream(iter(ids)))
    assert "".join(pieces) == "naïve 𝄞"
    assert "�" not in "".join(pieces)
    assert Bytes().decode([255]) == "�"


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
