"""The server for a minute: many clients, a signal amid them, and a thousand mistakes."""

import contextlib
import json
import random
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import eulerstack as es
from eulerstack.inference.engine import Engine
from eulerstack.tokens import Bytes

from ..conftest import PATIENCE
from .conftest import process

httpx = pytest.importorskip("httpx", reason="needs pip install 'eulerstack[dev]'")
pytestmark = pytest.mark.slow

Done = tuple[str, int, str]
"""A prompt, the tokens asked for, the text that came."""


def gauges(url: str) -> dict[str, int]:
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE).text.splitlines()
    return {line.split()[0]: int(line.split()[1]) for line in lines if not line.startswith("#")}


def at_rest(url: str) -> dict[str, int]:
    """The gauges, once nothing is open."""
    found = gauges(url)
    assert [found[f"eulerstack_{name}"] for name in ("slots_in_use", "queue_length", "answers_open")] == [0, 0, 0]
    return found


class Load:
    """Clients that stream prompts of their own, one after the other, until the time is up or they are sent away."""

    def __init__(self, url: str, clients: int, seconds: float) -> None:
        self.url, self.end = url, time.monotonic() + seconds
        self.wrong: list[str] = []
        self.done: list[Done] = []
        self.sent_away = 0
        self.threads = [threading.Thread(target=self._client, args=(i,)) for i in range(clients)]
        for thread in self.threads:
            thread.start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join()

    def _client(self, seed: int) -> None:
        dice = random.Random(seed)
        with httpx.Client(timeout=PATIENCE) as client:
            while time.monotonic() < self.end and not self.wrong:
                prompt, count = f"client {seed}: " + "x" * dice.randrange(40), dice.randrange(1, 40)
                try:
                    status, lines = self._stream(client, prompt, count)
                except httpx.ConnectError:
                    status, lines = 503, []
                if status == 503:
                    self.sent_away += 1
                    return
                if status != 200 or lines[-1] != "[DONE]":
                    self.wrong.append(f"{status} {lines[-1:]}")
                    return
                text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
                self.done.append((prompt, count, text))

    def _stream(self, client: Any, prompt: str, count: int) -> tuple[int, list[str]]:
        fields = {"prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
        with client.stream("POST", f"{self.url}/v1/completions", json=fields) as answer:
            return answer.status_code, [line.removeprefix("data: ") for line in answer.iter_lines() if line]


def differing(checkpoint: Path, done: list[Done]) -> list[Done]:
    """Texts that are not what the prompt gives alone, but for steps whose two best logits are as good as equal."""
    model, found = es.load_checkpoint(checkpoint), []
    for prompt, count, text in done:
        engine = Engine(model, 1, max_tokens=128)
        request = engine.submit(list(prompt.encode()), count, temperature=0, logprobs=2)
        while not engine.idle:
            engine.step()
        sure = list(request.tokens)
        for i, token in enumerate(request.tokens):
            best, second = token.top.values()  # type: ignore[attr-defined]
            if best - second <= 1e-3:
                sure = sure[:i]
                break
        whole = Bytes().decode(sure) if len(sure) == count else Bytes().decode(sure).rstrip("\N{REPLACEMENT CHARACTER}")
        if not (text == whole if len(sure) == count else text.startswith(whole)):
            found.append((prompt, count, text))
    return found


def test_64_streaming_clients_for_a_minute(checkpoint: Path) -> None:
    with process(checkpoint, "--max-tokens", "128", "--slots", "16") as (url, one):
        load = Load(url, 64, 60)
        load.join()
        assert not load.wrong and not load.sent_away
        assert len(load.done) >= 64
        after = at_rest(url)
        assert after['eulerstack_requests_total{status="200"}'] == len(load.done)
        assert after["eulerstack_generated_tokens_total"] == sum(count for _, count, _ in load.done)
        one.send_signal(signal.SIGTERM)
        assert one.wait(PATIENCE) == 0
    print(f"{len(load.done)} answers, {sum(count for _, count, _ in load.done)} tokens")
    assert not differing(checkpoint, load.done)


def test_a_signal_amid_the_load_lets_every_stream_end(checkpoint: Path) -> None:
    with process(checkpoint, "--max-tokens", "128", "--slots", "16") as (url, one):
        load = Load(url, 64, 60)
        time.sleep(10)
        one.send_signal(signal.SIGTERM)
        assert one.wait(PATIENCE) == 0
        load.join()
    assert not load.wrong and load.sent_away == 64
    assert load.done and not differing(checkpoint, load.done)


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) << 10


def refuse_no_http(url: str, noise: bytes) -> None:
    """What is no HTTP is refused, or cut off."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as one, contextlib.suppress(ConnectionError):
        one.sendall(noise + b"\r\n\r\n")
        one.shutdown(socket.SHUT_WR)
        assert one.recv(12) in (b"", b"HTTP/1.1 400")


VALUES: list[Any] = [
    *(
        None,
        True,
        "",
        "a",
        "\0",
        "\N{REPLACEMENT CHARACTER}" * 50,
        -1,
        0,
        3.5,
        -1e308,
        1e308,
        10**18,
        -(10**18),
        10**40,
    ),
    *([], [[]], [[[]]], {}, {"a": 1}, [None], [-1], [256], [10**18], [1.5], ["a", 1], ["a" * 300], "a" * 10_000),
    *([1] * 10_000, [[1]] * 1000, [{"role": "user", "content": "a" * 5000}], [{"role": 3}], {"a": {"a": {"a": [{}]}}}),
]
FIELDS = [
    *(
        "prompt",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "stop",
    ),
    *(
        "repetition_penalty",
        "seed",
        "stream",
        "stream_options",
        "echo",
        "logprobs",
        "model",
        "user",
        "best_of",
        "tools",
    ),
    *("logit_bias", "suffix", "presence_penalty", "response_format", "session", "__proto__", "", "\0"),
]


def mistaken(dice: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body and headers with at least one thing wrong, most often."""
    fields: dict[str, Any] = {"prompt": "a", "max_tokens": 1}
    for key in dice.sample(FIELDS, dice.randint(1, 3)):
        fields[key] = dice.choice(VALUES)
    body = bytearray(json.dumps(fields).encode())
    for _ in range(dice.choice((0, 0, 1, 5))):
        body[dice.randrange(len(body))] = dice.randrange(256)
    if dice.random() < 0.1:
        body = body[: dice.randrange(len(body))]
    if dice.random() < 0.05:
        body = bytearray(b"[" * dice.choice((100, 100_000, 2_000_000)))
    headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
    if dice.random() < 0.1:
        headers[dice.choice([*headers])] = dice.choice(
            ("", "a", "Bearer", "x" * 5000, "text/html", "application/json; a=b")
        )
    return bytes(body), headers


def test_a_thousand_mistakes(checkpoint: Path) -> None:
    dice, statuses, memory = random.Random(0), list[int](), list[int]()
    with (
        process(checkpoint, "--max-tokens", "256", "--api-key", "k") as (url, one),
        httpx.Client(timeout=PATIENCE) as client,
    ):
        for number in range(1500):
            body, headers = mistaken(dice)
            route = dice.choice(("completions", "completions", "chat/completions", "models", "nothing"))
            answer = client.request(
                dice.choice(("POST", "POST", "POST", "PUT")), f"{url}/v1/{route}", content=body, headers=headers
            )
            statuses.append(answer.status_code)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.text, body[:500], headers)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], body[:500]
            if number % 10 == 0:
                refuse_no_http(url, dice.randbytes(dice.choice((1, 100, 100_000))))
            if number % 100 == 99:
                memory.append(resident(one.pid))
        at_rest(url)
        one.send_signal(signal.SIGTERM)
        assert one.wait(PATIENCE) == 0
    refused = sum(status != 200 for status in statuses)
    print(f"{refused} refused of {len(statuses)}; memory {[m >> 20 for m in memory]} MiB")
    assert refused >= 1000
    assert memory[-1] < memory[4] + (16 << 20)
