"""The server: OpenAI's routes say what the engine gives, and every mistake has an answer."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch

from eulerstack.inference.openai import Asked, Chat, Completion, Fields, Message, Part, StreamOptions, read

from ..conftest import PATIENCE
from .conftest import Served, solo, words

httpx = pytest.importorskip("httpx", reason="needs pip install 'eulerstack[dev]'")

get, send = (partial(call, timeout=PATIENCE) for call in (httpx.get, httpx.post))
Serve = Callable[..., AbstractContextManager[Served]]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def post(served: Served, route: str = COMPLETIONS, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return send(served.url + route, json=fields, headers=headers)


def choices(served: Served, route: str = COMPLETIONS, **fields: Any) -> list[dict[str, Any]]:
    answer = post(served, route, **fields)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["choices"]
    return found


def events(served: Served, route: str = COMPLETIONS, **fields: Any) -> list[Any]:
    """The data of a stream's events."""
    answer = post(served, route, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines.pop() == ""
    data = [line.removeprefix("data: ") for line in lines]
    return [json.loads(one) if one != "[DONE]" else one for one in data]


def gauge(served: Served, name: str) -> int:
    lines = get(f"{served.url}/metrics").text.splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"eulerstack_{name} ")]
    return int(value)


def soon(true: Callable[[], bool], between: Callable[[], None] = lambda: None) -> None:
    """Waits until it is true, and does something between two looks."""
    end = time.monotonic() + PATIENCE
    while not true():
        between()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def served(serve: Serve) -> Iterator[Served]:
    with serve() as one:
        yield one


def test_every_kind_of_prompt_gives_what_the_engine_gives_alone(served: Served) -> None:
    model = served.engine.model
    wanted = {text: words(solo(model, text, 12)) for text in ("def ", "é")}
    greedy = {"max_tokens": 12, "temperature": 0}
    for prompt in ("def ", list(b"def ")):
        assert [c["text"] for c in choices(served, prompt=prompt, **greedy)] == [wanted["def "]]
    for prompts in (["def ", "é"], [list(b"def "), list("é".encode())]):
        assert [c["text"] for c in choices(served, prompt=prompts, **greedy)] == [*wanted.values()]
    rules = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    found = choices(served, prompt=["a", "b"], max_tokens=9, n=2, seed=5, **rules)
    assert [c["index"] for c in found] == [0, 1, 2, 3]
    assert [c["text"] for c in found] == [
        words(solo(model, prompt, 9, **rules, seed=seed)) for prompt in "ab" for seed in (5, 6)
    ]
    answer = post(served, prompt=["abc", "d"], n=2, max_tokens=3).json()
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
    assert answer["object"] == "text_completion" and answer["model"] == served.api.name
    assert post(
        served, prompt="a", model=served.api.name, user="me", best_of=1, presence_penalty=0.0, seed=None
    ).is_success


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"seed": 3, "n": 3, "temperature": 0.7},
        {"seed": 3, "logprobs": 3, "echo": True},
        {"seed": 3, "logprobs": 0, "stop": ["a", "\x01"], "max_tokens": 60},
        {"seed": 4, "echo": True, "max_tokens": 0},
    ],
)
def test_a_stream_joined_is_the_answer(served: Served, fields: dict[str, Any]) -> None:
    fields = {"prompt": ["héllo", "wörld"], "max_tokens": 30, **fields}
    whole = choices(served, **fields)
    stream = events(served, **fields, stream_options={"include_usage": True})
    assert stream.pop() == "[DONE]"
    assert stream.pop()["usage"] == post(served, **fields).json()["usage"]
    assert len({event["id"] for event in stream}) == 1
    for choice in whole:
        mine = [event["choices"][0] for event in stream if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for one in mine for value in one["logprobs"][name]] == values


@pytest.mark.parametrize("count", [0, 1])
def test_echo_scores_a_prompt_as_lm_evaluation_harness_reads_it(served: Served, count: int) -> None:
    prompt = list("def né(x)".encode())
    prompt += solo(served.engine.model, prompt, 4)  # the greedy ones among them
    (choice,) = choices(served, prompt=[prompt], max_tokens=count, echo=True, logprobs=2, temperature=0)
    text, found = choice["text"], choice["logprobs"]
    assert text.startswith("def né(x)") and choice["finish_reason"] == "length"
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, len(prompt) + count)
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    with torch.inference_mode():
        scores = served.engine.model(torch.tensor([prompt]))[0].log_softmax(-1)
    for i, token in enumerate(prompt[1:]):
        assert found["token_logprobs"][i + 1] == pytest.approx(scores[i, token].item(), abs=1e-6)
        best = scores[i].max().item()
        assert max(found["top_logprobs"][i + 1].values()) == pytest.approx(best, abs=1e-6)
        assert len(found["top_logprobs"][i + 1]) in (2, 3) and found["tokens"][i + 1] in found["top_logprobs"][i + 1]
        is_greedy = found["token_logprobs"][i + 1] == max(found["top_logprobs"][i + 1].values())
        assert is_greedy == (scores[i].argmax().item() == token)
    assert found["tokens"][4:8] == ["n", "bytes:\\xc3", "bytes:\\xa9", "("]
    assert found["text_offset"][:9] == [0, 1, 2, 3, 4, 5, 5, 6, 7]


def test_stops_cut_the_text_and_free_the_slot(served: Served) -> None:
    free = words(solo(served.engine.model, "x", 40, seed=1, temperature=1.0))
    stop = free[10:12]
    cut = free[: free.index(stop)]
    fields = {"prompt": "x", "max_tokens": 40, "seed": 1, "logprobs": 0}
    for given in (stop, ["never", stop]):
        (choice,) = choices(served, stop=given, **fields)
        assert (choice["text"], choice["finish_reason"]) == (cut, "stop")
        assert all(offset < len(cut) for offset in choice["logprobs"]["text_offset"])
    assert "".join(e["choices"][0]["text"] for e in events(served, stop=stop, **fields)[:-1]) == cut
    soon(lambda: gauge(served, "slots_in_use") == 0)


def test_a_stop_after_a_penalty_ends_no_one_else(served: Served) -> None:
    """The engine's thread died of a cancelled request whose tokens were penalised."""
    fields = {"prompt": "x", "max_tokens": 40, "seed": 1, "repetition_penalty": 1.2}
    (free,) = choices(served, **fields)
    stop = free["text"][10:12]
    for _ in range(2):
        (choice,) = choices(served, stop=stop, **fields)
        assert choice["finish_reason"] == "stop"
    soon(lambda: gauge(served, "slots_in_use") == 0)


def test_chat_is_lines_of_roles(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": " hello "},
        {"role": "user", "content": "why?"},
    ]
    prompt = "system: be brief\nuser: hi\nassistant: hello\nuser: why?\nassistant:"
    tokens = solo(served.engine.model, prompt, 20)
    for key in ("max_tokens", "max_completion_tokens"):
        (choice,) = choices(served, CHAT, messages=talk, temperature=0, **{key: 20}, logprobs=False, tools=[])
        assert choice["message"] == {"role": "assistant", "content": words(tokens)}
    stream = events(served, CHAT, messages=talk, temperature=0, max_tokens=20)
    assert stream[0]["object"] == "chat.completion.chunk" and stream[-1] == "[DONE]"
    assert stream[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in stream[1:-1]) == words(tokens)
    monkeypatch.setattr("eulerstack.inference.routes.TURN", words(tokens)[5:7])
    (choice,) = choices(served, CHAT, messages=talk, temperature=0)
    assert words(tokens).startswith(choice["message"]["content"]) and choice["finish_reason"] == "stop"
    assert len(choice["message"]["content"]) <= 5


def test_without_a_count_chat_goes_on_to_the_end_of_the_slot(served: Served) -> None:
    answer = post(served, CHAT, messages=[{"role": "user", "content": "hi"}], temperature=0).json()
    assert answer["usage"]["total_tokens"] == served.engine.state.max_tokens == 256


def test_models_and_health(served: Served) -> None:
    name = served.api.name
    assert [one["id"] for one in get(f"{served.url}/v1/models").json()["data"]] == [name]
    assert get(f"{served.url}/v1/models/{name}").json()["object"] == "model"
    assert get(f"{served.url}/health").json() == {"status": "ok"}


def test_metrics_count(served: Served) -> None:
    post(served, prompt="abc", max_tokens=4)
    post(served, prompt="abc", max_tokens=-4)
    text = get(f"{served.url}/metrics").text
    for line in (
        'requests_total{status="200"} 1',
        'requests_total{status="400"} 1',
        "prompt_tokens_total 3",
        "generated_tokens_total 4",
        "slots 4",
        "slots_in_use 0",
        "queue_length 0",
        "answers_open 0",
        f"state_bytes {served.engine.state.nbytes()}",
    ):
        assert f"eulerstack_{line}\n" in text


def test_prompts_that_begin_alike_are_read_once(serve: Serve) -> None:
    with serve(prefix_bytes=1 << 24) as served:
        for end in "ab":
            (choice,) = choices(served, prompt="x" * 40 + end, max_tokens=5, temperature=0)
            assert choice["text"] == words(solo(served.engine.model, "x" * 40 + end, 5))
        assert gauge(served, "prefix_hits_total") == 1 and gauge(served, "prefix_tokens_total") == 32
        assert gauge(served, "prefix_bytes") > 0 == gauge(served, "prefix_evictions_total")


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": ""}, "a prompt is empty", None),
    ({"prompt": []}, "a prompt is empty", None),
    ({"prompt": [[]]}, "a prompt is empty", None),
    ({}, "prompt is missing", "prompt"),
    ({"prompt": None}, "prompt is missing", "prompt"),
    ({"prompt": 3}, "must be a text, token ids", "prompt"),
    ({"prompt": ["a", [1]]}, "must be a text, token ids", "prompt"),
    ({"prompt": [1, True]}, "must be a text, token ids", "prompt"),
    ({"prompt": [1.0]}, "must be a text, token ids", "prompt"),
    ({"prompt": {"a": 1}}, "must be a text, token ids", "prompt"),
    ({"prompt": [256]}, "the model knows 0 to 255", None),
    ({"prompt": [-1]}, "the model knows 0 to 255", None),
    ({"prompt": [10**30]}, "the model knows 0 to 255", None),
    ({"prompt": "a" * 250}, "are more than the 256 that fit", "max_tokens"),
    ({"max_tokens": 10**15}, "are more than the 256 that fit", "max_tokens"),
    ({"max_tokens": 10**30}, "are more than the 256 that fit", "max_tokens"),
    ({"max_tokens": 0}, "without echo", "max_tokens"),
    ({"max_tokens": -1}, "greater than or equal to 0", "max_tokens"),
    ({"max_tokens": 3.0}, "max_tokens = 3.0: input should be a valid integer", "max_tokens"),
    ({"max_tokens": "3"}, "max_tokens = '3'", "max_tokens"),
    ({"max_tokens": True}, "max_tokens = True", "max_tokens"),
    ({"temperature": -0.1}, "temperature = -0.1", "temperature"),
    ({"temperature": 1e300}, "temperature = 1e+300", "temperature"),
    ({"temperature": "hot"}, "temperature = 'hot'", "temperature"),
    ({"top_p": 0}, "top_p = 0", "top_p"),
    ({"top_p": 1.5}, "top_p = 1.5", "top_p"),
    ({"top_k": 0}, "top_k = 0", "top_k"),
    ({"top_k": 10**30}, "top_k = 1000", "top_k"),
    ({"min_p": 2}, "min_p = 2", "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty = 0", "repetition_penalty"),
    ({"seed": 1 << 63}, "seed = 9223372036854775808", "seed"),
    ({"n": 0}, "n = 0", "n"),
    ({"n": 128}, "are more answers than fit (20)", "n"),
    ({"logprobs": 21}, "logprobs = 21", "logprobs"),
    ({"logprobs": True}, "logprobs = True", "logprobs"),
    ({"stop": ""}, "none of them empty", "stop"),
    ({"stop": ["a"] * 17}, "up to 16", "stop"),
    ({"stop": [3]}, "must be a text or a list", "stop"),
    ({"echo": 1}, "echo = 1", "echo"),
    ({"stream": "yes"}, "stream = 'yes'", "stream"),
    ({"stream_options": {"usage": True}}, "stream_options.usage", "stream_options.usage"),
    ({"best_of": 2}, "best_of = 2 is not supported; leave it out", "best_of"),
    ({"presence_penalty": 0.5}, "presence_penalty = 0.5", "presence_penalty"),
    ({"logit_bias": {"50256": -100}}, "logit_bias", "logit_bias"),
    ({"suffix": "end"}, "suffix = 'end'", "suffix"),
    ({"colour": "red"}, "'colour' is no field", "colour"),
    ({"metadata": {"a": 1}}, "metadata = {'a': 1} is not supported", "metadata"),
    ({"prompt": [None]}, "must be a text, token ids", "prompt"),
    ({"stop": [None]}, "must be a text or a list", "stop"),
    ({"messages": []}, "'messages' is no field", "messages"),
]


@pytest.mark.parametrize(("fields", "message", "param"), REFUSED)
def test_bad_fields_are_refused_by_name(
    shared: Served, fields: dict[str, Any], message: str, param: str | None
) -> None:
    answer = post(shared, **({"prompt": "a"} if fields and "prompt" not in fields else {}), **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": None}, "messages"),
        ({"messages": [None]}, "messages.0"),
        ({"messages": [{"role": None, "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.0.x"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "content": None, "refusal": "no"}]}, "messages.0.refusal"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_bad_chats_are_refused_by_name(shared: Served, fields: dict[str, Any], param: str) -> None:
    answer = post(shared, CHAT, **{"messages": [{"role": "user", "content": "a"}], **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def fields_of(kind: type[Fields]) -> set[str]:
    return {*kind.model_fields, *kind.neutral, "colour"}


def test_a_null_is_as_good_as_left_out_wherever_it_stands() -> None:
    part = {**dict.fromkeys(fields_of(Part)), "type": "text", "text": "a"}
    said = {**dict.fromkeys(fields_of(Message)), "role": "assistant"}
    asked = {**dict.fromkeys(fields_of(Message)), "role": "user", "content": [part]}
    settings = {"stream_options": dict.fromkeys(fields_of(StreamOptions)), "metadata": {"a": None}}
    settings |= {"response_format": {"type": "text", "json_schema": None}, "logit_bias": {"7": None}}
    for kind, needed, given in (
        (Chat, {"messages": [{"role": "user", "content": "a"}]}, {"messages": [asked]}),
        (Chat, {"messages": [{"role": "assistant", "content": ""}]}, {"messages": [said]}),
        (Completion, {"prompt": "a"}, {"prompt": "a"}),
    ):
        nulls = dict.fromkeys((fields_of(kind) | settings.keys()) - given.keys())
        assert read_dict(kind, nulls | given) == read_dict(kind, needed)
        assert read_dict(kind, nulls | given | settings) == read_dict(kind, needed)


def read_dict(kind: type[Asked], fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = read(json.dumps(fields).encode(), kind).model_dump()
    for message in found.get("messages", ()):
        message["content"] = Message(**message).line()
    return found


def test_an_answer_of_a_client_goes_back_as_history(served: Served) -> None:
    """With all that the client fills in: what is null, and lists of nothing."""
    user = {"role": "user", "content": "hi"}
    plain = {"role": "assistant", "content": "ho"}
    names = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")
    wanted = choices(served, CHAT, messages=[user, plain, user], temperature=0, max_tokens=9)
    for more in (dict.fromkeys(names), {"tool_calls": [], "annotations": [], "refusal": ""}):
        found = choices(served, CHAT, messages=[user, {**plain, **more}, user], temperature=0, max_tokens=9)
        assert found == wanted
    empty = choices(served, CHAT, messages=[user, {**plain, "content": ""}, user], temperature=0, max_tokens=9)
    for silent in ({"role": "assistant"}, {"role": "assistant", "content": None}):
        assert choices(served, CHAT, messages=[user, silent, user], temperature=0, max_tokens=9) == empty
    last = events(served, CHAT, messages=[user], max_tokens=2, stream_options={"include_usage": None})[-2]
    assert last["choices"] and "usage" not in last


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", JSON, 400, "no JSON"),
        (b"{", JSON, 400, "no JSON"),
        (b"[]", JSON, 400, "must be a JSON object"),
        (b"null", JSON, 400, "must be a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', JSON, 400, "no JSON"),
        (b'{"prompt": "a", "temperature": -Infinity}', JSON, 400, "no JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', JSON, 400, "temperature"),
        (b'{"prompt": "\xff"}', JSON, 400, "no JSON"),
        (b'{"prompt": "\\ud800"}', JSON, 400, "no JSON"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", JSON, 400, "recursion"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", JSON, 400, ""),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415, "application/json"),
        (b'{"prompt": "a"}', {}, 415, "application/json"),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', JSON, 413, "1048576 bytes"),
        (b'{"prompt": "a", "model": "gpt-5"}', JSON, 404, "'gpt-5' is not served here"),
    ],
)
def test_bad_bodies_are_refused(
    shared: Served, body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    answer = send(shared.url + COMPLETIONS, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert post(shared, prompt="a", max_tokens=1).is_success


def test_other_routes_and_verbs_are_refused_in_the_same_shape(shared: Served) -> None:
    for answer, status in (
        (get(f"{shared.url}/nothing"), 404),
        (get(shared.url + COMPLETIONS), 405),
        (get(f"{shared.url}/v1/models/other"), 404),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert get(shared.url + COMPLETIONS).headers["allow"] == "POST"


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """One server for all that it refuses."""
    import eulerstack as es

    from .conftest import running

    builder = es.StackBuilder(d_model=16, n_heads=2, vocab_size=256, max_seq_len=256, mlp_ratio=1.0)
    with running(builder.add("retnet").build()) as one:
        yield one


def test_a_key_is_asked_for(serve: Serve) -> None:
    with serve(key="sésame") as served:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sésame".encode()}):
            for answer in (
                send(served.url + COMPLETIONS, content=b"{", headers=given),
                get(f"{served.url}/v1/models", headers=given),
            ):
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer sésame".encode()}
        assert send(served.url + COMPLETIONS, json={"prompt": "a"}, headers=right).is_success
        assert get(f"{served.url}/health").is_success


def stepwise(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The engine takes no step any more but those that are given: what a test sees depends on no clock."""
    step, given = served.engine.step, threading.Semaphore(0)

    def held() -> Any:
        assert given.acquire(timeout=PATIENCE)
        return step()

    monkeypatch.setattr(served.engine, "step", held)
    return given.release


def opened(served: Served, **fields: Any) -> socket.socket:
    """A request as bytes on a socket, to leave without a word."""
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a", "max_tokens": 200, **fields}).encode()
    one = socket.create_connection((host, int(port)))
    one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    one.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return one


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(serve: Serve, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    with serve(slots=1) as served:
        step = stepwise(served, monkeypatch)
        running, waiting = opened(served, stream=stream), opened(served, stream=stream)
        soon(lambda: gauge(served, "answers_open") == 2)
        soon(lambda: gauge(served, "slots_in_use") == 1 and gauge(served, "queue_length") == 1, step)
        waiting.close()
        soon(lambda: gauge(served, "queue_length") == 0, step)
        running.close()
        soon(lambda: gauge(served, "slots_in_use") == 0 and gauge(served, "answers_open") == 0, step)
        assert gauge(served, "generated_tokens_total") < 100
        step(100)
        assert post(served, prompt="a", max_tokens=2).is_success


def test_a_full_queue_says_when_to_come_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(slots=1, queue=1) as served:
        step = stepwise(served, monkeypatch)
        inside = [opened(served), opened(served)]
        soon(lambda: gauge(served, "answers_open") == 2)
        for stream in (False, True):
            answer = post(served, prompt="a", stream=stream)
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"
        for one in inside:
            one.close()
        soon(lambda: gauge(served, "answers_open") == 0, step)
        step(100)
        assert post(served, prompt="a", max_tokens=1).is_success


def test_a_failing_step_fails_those_in_it_and_no_other(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(slots=1) as served:
        read = served.engine._read_chunk

        def broken() -> Any:
            if served.engine.active[served.engine.reading[0]].prompt == [7]:
                raise RuntimeError("secret")
            return read()

        monkeypatch.setattr(served.engine, "_read_chunk", broken)
        answer = post(served, prompt=[7])
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text
        (event,) = events(served, prompt=[7])
        assert "the step that this request was in failed (RuntimeError)" in event["error"]["message"]
        assert choices(served, prompt="x", max_tokens=5, temperature=0)[0]["text"] == words(
            solo(served.engine.model, "x", 5)
        )
        assert gauge(served, "slots_in_use") == gauge(served, "answers_open") == 0


def test_an_answer_whose_last_token_came_in_a_failing_step_is_told(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(slots=2) as served, ThreadPoolExecutor() as pool:
        engine, gate = served.engine, threading.Event()
        step, read = engine.step, engine._read_chunk

        def held() -> Any:
            assert gate.wait(PATIENCE)
            return step()

        def broken() -> Any:
            if engine.active[engine.reading[0]].prompt == [7]:
                raise RuntimeError
            return read()

        monkeypatch.setattr(engine, "step", held)
        monkeypatch.setattr(engine, "_read_chunk", broken)
        first = pool.submit(post, served, prompt=[1], max_tokens=2)  # its second token comes while [7] is read
        soon(lambda: gauge(served, "queue_length") == 1)
        second = pool.submit(post, served, prompt=[7])
        soon(lambda: gauge(served, "answers_open") == 2 and served.api.service._calls.qsize() == 1)
        gate.set()
        assert first.result(PATIENCE).status_code == second.result(PATIENCE).status_code == 500
        assert gauge(served, "answers_open") == 0


def test_a_signal_lets_nobody_in_and_those_inside_finish(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(slots=2, drain=PATIENCE) as served, httpx.Client(timeout=PATIENCE) as client:
        step = stepwise(served, monkeypatch)
        step(10)
        with client.stream(
            "POST", served.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 60, "stream": True}
        ) as it:
            lines = it.iter_lines()
            next(lines)
            served.server.handle_exit(signal.SIGTERM, None)
            answer = post(served, prompt="a")
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "closing"
            assert get(f"{served.url}/health").status_code == 503
            step(100)
            said = [line for line in lines if line]
        assert said[-1] == "data: [DONE]" and '"finish_reason": "length"' in said[-2]
        served.thread.join(PATIENCE)
        assert not served.thread.is_alive()


def test_those_who_take_too_long_are_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(drain=0.3) as served, httpx.Client(timeout=PATIENCE) as client:
        step = served.engine.step
        monkeypatch.setattr(served.engine, "step", lambda: (time.sleep(0.1), step())[1])  # 20 s for 200 tokens
        fields = {"prompt": "a", "max_tokens": 200, "stream": True}
        with client.stream("POST", served.url + COMPLETIONS, json=fields) as it:
            lines = it.iter_lines()
            next(lines)
            served.server.handle_exit(signal.SIGTERM, None)
            said = [line for line in lines if line]
        assert "the server is shutting down" in said[-1]
        served.thread.join(PATIENCE)
        assert not served.thread.is_alive()
