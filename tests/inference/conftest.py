"""A server of a tiny stack, in a thread of this process."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

import eulerstack as es
from eulerstack.inference.engine import Engine
from eulerstack.tokens import Bytes

Build = Callable[..., es.Stack]


@dataclass
class Served:
    """A running server: where it is, and what it is made of."""

    url: str
    api: Any
    server: Any
    thread: threading.Thread

    @property
    def engine(self) -> Engine:
        engine: Engine = self.api.engine
        return engine


@contextmanager
def running(
    model: es.Stack, *, slots: int = 4, queue: int = 16, key: str | None = None, body: int = 1 << 20, drain: float = 20
) -> Iterator[Served]:
    from eulerstack.inference.server import Api, Server
    from eulerstack.inference.service import Service

    api = Api(Service(Engine(model, slots, prefill=16), queue), Bytes(), model.spec.model.name, key, body)
    server = Server(api, drain)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", api, server, thread)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def serve(build_mini: Build) -> Callable[..., Any]:
    """Serves the mini, in float64 so that a slot's place cannot change a token."""
    pytest.importorskip("fastapi", reason="needs pip install 'eulerstack[serve]'")
    return lambda **options: running(build_mini(), **options)


def solo(model: es.Stack, prompt: str | list[int], count: int, **rules: Any) -> list[int]:
    """What an engine gives a prompt that is alone in it."""
    engine = Engine(model, 1, prefill=16)
    ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
    request = engine.submit(ids, count, **{"temperature": 0, **rules})
    while not engine.idle:
        engine.step()
    return request.tokens


def words(tokens: list[int]) -> str:
    return Bytes().decode(tokens)
