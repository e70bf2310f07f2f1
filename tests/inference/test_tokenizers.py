"""Every kind of tokenizer.json through the server, its streams, echo, scores, stops and sessions, and `generate`."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import eulerstack as es
from eulerstack.inference import generate as generating
from eulerstack.inference.sessions import Sessions
from eulerstack.spec import HFTokenizer
from eulerstack.tokens import HuggingFace

from ..cli.conftest import eulerstack
from ..tokenizer_files import KINDS, TEXTS, Kind, words
from .conftest import Served, running, solo

__all__ = ["eulerstack"]

httpx = pytest.importorskip("httpx", reason="needs pip install 'eulerstack[dev]'")
pytest.importorskip("fastapi", reason="needs pip install 'eulerstack[serve]'")

ROWS = 320
"""Of the model: more than any of the tokenizers has tokens, so that ids come which none of them knows."""


def stack(rows: int = ROWS, contract: HFTokenizer | None = None) -> es.Stack:
    """Weights as they are drawn: any id is as likely as another."""
    torch.manual_seed(0)
    builder = es.StackBuilder(d_model=16, n_heads=2, vocab_size=rows, max_seq_len=512, mlp_ratio=1.0)
    builder.set(tokenizer_contract=(contract or HFTokenizer(type="hf", pretrained="none")).model_dump())
    return builder.add("retnet", {"chunk_size": 16}).build(dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def model() -> es.Stack:
    return stack()


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def tokenizer(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return kind.saved(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def served(model: es.Stack, tokenizer: HuggingFace) -> Iterator[Served]:
    sessions = Sessions(tokenizer.file.parent / "sessions", model)
    with running(model, tokenizer=tokenizer, sessions=sessions) as one:
        yield one


@pytest.fixture
def serve(model: es.Stack, tmp_path: Path) -> "Serve":
    """For those who ask for one kind alone."""
    return lambda kind: running(model, tokenizer=kind.saved(tmp_path))


def post(served: Served, route: str = "/v1/completions", **fields: Any) -> Any:
    return httpx.post(served.url + route, json=fields, timeout=60, verify=False)  # certificates take a while to read


def complete(served: Served, **fields: Any) -> dict[str, Any]:
    answer = post(served, **fields)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return dict(choice)


def streamed(served: Served, **fields: Any) -> str:
    answer = post(served, stream=True, **fields)
    *events, done = answer.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    return "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)


def test_answers_streams_echo_scores_and_stops(kind: Kind, tokenizer: HuggingFace, served: Served) -> None:
    prompt = tokenizer.encode(TEXTS[1])
    ids = solo(served.engine.model, prompt, 24, seed=3, temperature=1, stop=tokenizer.stops)
    text = "".join(tokenizer.stream(iter(ids), prompt))
    fields = {"prompt": TEXTS[1], "max_tokens": 24, "seed": 3}
    assert streamed(served, **fields) == text
    whole = complete(served, **fields, echo=True, logprobs=4)
    assert whole["text"] == kind.decoded([*prompt, *ids])
    scored = [*prompt, *(token for token in ids if token not in tokenizer.stops)]
    check_scores(whole, [tokenizer.name(token) for token in scored], len(prompt))
    stop = text[7:10] or "unmet"  # where most of the ids stand for nothing
    cut = complete(served, **fields, stop=stop, logprobs=1)
    assert cut["text"] == text.partition(stop)[0]
    assert cut["finish_reason"] == ("stop" if stop in text or {*ids} & tokenizer.stops else "length")
    assert stop not in text or all(offset < len(cut["text"]) for offset in cut["logprobs"]["text_offset"])


def check_scores(choice: dict[str, Any], names: list[str], prompt: int) -> None:
    """Of each token, and of four likely ones or five; each stands where the text has it."""
    told = choice["logprobs"]
    assert told["tokens"] == names and len({*map(len, (*told.values(), names))}) == 1
    assert all(
        len(top) in (4, 5) and name in top for name, top in zip(names[1:], told["top_logprobs"][1:], strict=True)
    )
    offsets = told["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] >= 0 and offsets[-1] <= len(choice["text"])
    assert None not in told["token_logprobs"][1:] and prompt < len(offsets)


def test_a_conversation_that_was_parked_goes_on_as_one(tokenizer: HuggingFace, served: Served) -> None:
    model, prompt = served.engine.model, tokenizer.encode(TEXTS[2])
    first = solo(model, prompt, 9, seed=1, temperature=1)
    turn = first[:3]  # any ids: the second half of a character perhaps
    second = solo(model, [*prompt, *first, *turn], 20, seed=2, temperature=1)
    rules = {"session": "a", "temperature": 1}
    if {*first, *second} & tokenizer.stops:
        pytest.fail("draw others: this conversation ends early")
    one = complete(served, prompt=prompt, max_tokens=9, seed=1, **rules)
    two = complete(served, prompt=turn, max_tokens=20, seed=2, **rules)
    assert one["text"] == "".join(tokenizer.stream(iter(first), prompt))
    assert two["text"] == "".join(tokenizer.stream(iter(second), [*prompt, *first, *turn]))


def test_the_echo_of_a_turn_begins_with_its_space(model: es.Stack, tmp_path: Path) -> None:
    tokenizer = KINDS["byte fallback, a space taken off"].saved(tmp_path)
    with running(model, tokenizer=tokenizer, sessions=Sessions(tmp_path / "sessions", model)) as served:
        complete(served, prompt="the", max_tokens=1, session="a", seed=0)
        told = complete(served, prompt="the cat", max_tokens=1, session="a", seed=0, echo=True, logprobs=0)
    assert told["text"].startswith(" the cat") and told["logprobs"]["text_offset"][:2] == [0, 4]


def test_generate_writes_the_prompt_and_what_follows_it(
    kind: Kind, tokenizer: HuggingFace, tmp_path: Path, eulerstack: Callable[..., Result]
) -> None:
    model = stack(contract=kind.contract(Path("nowhere")))
    es.save_checkpoint(model, tmp_path / "run", tokenizer)
    given = ["generate", "--checkpoint", str(tmp_path / "run"), "--max-new-tokens", "20", "--seed", "1"]
    given += ["--temperature", "1", "--prompt", "the cat"]
    rows = [tokenizer.encode("the cat"), tokenizer.encode("the")]
    steps = list(es.generate(model, rows, 20, seed=1, stop=tokenizer.stops))
    ids = [[token for step in steps if (token := step[row]) is not None] for row in (0, 1)]
    texts = ["".join(tokenizer.stream(iter(one), row)) for one, row in zip(ids, rows, strict=True)]
    assert eulerstack(*given).output == f"the cat{texts[0]}\n"
    batch = eulerstack(*given, "--prompt", "the").output
    assert batch == f"--- 1 of 2\nthe cat{texts[0]}\n--- 2 of 2\nthe{texts[1]}\n"
    table = eulerstack(*given, "--logprobs", "2")
    lines = table.output.splitlines()
    assert table.exit_code == 0 and len(lines) == len(ids[0])
    assert all(repr(tokenizer.name(token)) in line for token, line in zip(ids[0], lines, strict=True))


# --- what fails, and how it is said

Serve = Callable[[Kind], AbstractContextManager[Served]]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_fails_ends_with_an_error_event(
    serve: Serve, route: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("of the test")

    said = {"messages": [{"role": "user", "content": "the"}]} if "chat" in route else {"prompt": "the"}
    with serve(Kind(words)) as served:
        with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
            patched.setattr("eulerstack.inference.text.Text.add", fails)
            answer = post(served, route, **said, max_tokens=5, stream=True)
        assert complete(served, prompt="the", max_tokens=3)["finish_reason"] == "length"
    assert answer.status_code == 200
    event = json.loads(answer.text.split("\n\n")[-2].removeprefix("data: "))
    assert event["error"]["type"] == "server_error" and "ZeroDivisionError" in event["error"]["message"]
    assert "a stream failed" in caplog.text and "of the test" in caplog.text


def test_a_prompt_that_no_token_knows_is_refused(serve: Serve) -> None:
    def make() -> Any:
        backend = words()
        backend.model.unk_token = "<none>"
        return backend

    with serve(Kind(make)) as served:
        for stream in (True, False):
            answer = post(served, prompt="dog", stream=stream)
            assert answer.status_code == 400 and "cannot encode 'dog'" in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "prompt"


def test_a_prompt_without_tokens_is_refused(serve: Serve) -> None:
    with serve(Kind(words)) as served:
        for prompt in ("", " ", []):
            answer = post(served, prompt=prompt)
            assert answer.status_code == 400 and "a prompt is empty" in answer.json()["error"]["message"]


def saved(tmp_path: Path, kind: Kind, rows: int) -> str:
    es.save_checkpoint(stack(rows, kind.contract(tmp_path)), tmp_path / "run", kind.saved(tmp_path))
    return str(tmp_path / "run")


@pytest.mark.parametrize("verb", [("generate", "--prompt", "the"), ("serve", "--port", "0")])
def test_a_stack_with_fewer_rows_than_ids_is_refused_when_it_is_loaded(
    tmp_path: Path, eulerstack: Callable[..., Result], verb: tuple[str, ...]
) -> None:
    name, *options = verb
    result = eulerstack(name, "--checkpoint", saved(tmp_path, KINDS["holes"], 11), *options)
    assert result.exit_code == 2
    assert result.stderr == "model.vocab_size = 11 is less than the tokenizer's 301; write vocab_size: 301\n"


def test_generate_ends_with_a_sentence_where_a_step_fails(
    tmp_path: Path, eulerstack: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, *_: object) -> None:
            raise RuntimeError("no memory\nand a long list")

    monkeypatch.setattr(generating, "Steps", Failing)
    result = eulerstack("generate", "--checkpoint", saved(tmp_path, Kind(words), 20), "--prompt", "the")
    assert result.exit_code == 2 and result.stdout.startswith("the")
    assert result.stderr == "the text ends here, the next step failed: RuntimeError: no memory\n"
