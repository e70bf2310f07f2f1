"""Conversations of the server: parked between two requests, there after a kill."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eulerstack as es
from eulerstack.inference.sessions import Sessions
from eulerstack.tokens import Bytes

from ..conftest import PATIENCE
from .conftest import process, running, solo, words

httpx = pytest.importorskip("httpx", reason="needs pip install 'eulerstack[dev]'")
pytest.importorskip("fastapi", reason="needs pip install 'eulerstack[serve]'")

Build = Callable[..., es.Stack]


def complete(url: str, **fields: Any) -> Any:
    return httpx.post(f"{url}/v1/completions", json={"temperature": 0, **fields}, timeout=PATIENCE)


def test_a_turn_goes_on_from_the_last_one(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini()
    first = solo(model, "hello", 6)
    second = solo(model, [*b"hello", *first, *b" more"], 6)
    with running(model, sessions=Sessions(tmp_path, model)) as served:
        (one,) = complete(served.url, prompt="hello", max_tokens=6, session="a").json()["choices"]
        assert one["text"] == words(first)
        answer = complete(served.url, prompt=" more", max_tokens=6, session="a", echo=True, logprobs=0).json()
        (two,) = answer["choices"]
        assert two["text"] == " more" + words(second)
        assert answer["usage"]["prompt_tokens"] == 5
        told = two["logprobs"]
        assert len(told["tokens"]) == len(told["token_logprobs"]) == 11 and None not in told["token_logprobs"]
        assert told["tokens"] == [Bytes().name(token) for token in [*b" more", *second]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"session": "../a"}, "pattern"),
        ({"session": ""}, "pattern"),
        ({"session": "a", "stop": "x"}, "cannot go with stop"),
        ({"session": "a", "n": 2}, "goes with one prompt and n = 1"),
        ({"session": "a", "prompt": ["a", "b"]}, "goes with one prompt and n = 1"),
    ],
)
def test_what_no_session_can_be_is_refused(
    build_mini: Build, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    model = build_mini()
    with running(model, sessions=Sessions(tmp_path, model)) as served:
        answer = complete(served.url, **{"prompt": "a", **fields})
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "session"
    assert not list(tmp_path.iterdir())


def test_without_a_folder_there_are_none(build_mini: Build) -> None:
    with running(build_mini()) as served:
        answer = complete(served.url, prompt="a", session="a")
        assert answer.status_code == 400 and "start the server with --sessions DIR" in answer.text


def test_a_session_that_cannot_be_parked_is_said_to_be_lost(
    build_mini: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_mini()
    sessions = Sessions(tmp_path, model)
    with running(model, sessions=sessions) as served:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(sessions, "park", full)
        answer = complete(served.url, prompt="a", session="a")
        assert answer.status_code == 500 and "could not be parked: No space left" in answer.text
        assert complete(served.url, prompt="a").status_code == 200


@pytest.mark.slow
def test_a_kill_loses_no_parked_session(checkpoint: Path, tmp_path: Path) -> None:
    model = es.load_checkpoint(checkpoint)
    first = solo(model, "hello", 6)
    options = ("--max-tokens", "64", "--slots", "2", "--sessions", str(tmp_path / "parked"))
    with process(checkpoint, *options) as (url, one):
        complete(url, prompt="hello", max_tokens=6, session="a")
        one.send_signal(signal.SIGKILL)
        one.wait()
    with process(checkpoint, *options) as (url, _):
        answer = complete(url, prompt=" more", max_tokens=1, echo=True, logprobs=0, session="a").json()
    (whole,) = answer["choices"]
    with running(model) as served:
        text = [*b"hello", *first, *b" more"]
        (wanted,) = complete(served.url, prompt=text, max_tokens=1, echo=True, logprobs=0).json()["choices"]
    assert whole["logprobs"]["token_logprobs"] == pytest.approx(wanted["logprobs"]["token_logprobs"][-6:], abs=1e-4)
