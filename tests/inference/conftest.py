"""A server of a tiny stack, in a thread of this process."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import eulerstack as es
from eulerstack.inference.engine import Engine
from eulerstack.tokens import Bytes, Tokenizer

from ..conftest import PATIENCE

MINI = "arch_expert_research_mini"
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
    model: es.Stack,
    *,
    slots: int = 4,
    queue: int = 16,
    key: str | None = None,
    body: int = 1 << 20,
    drain: float = 20,
    tokenizer: Tokenizer | None = None,
    **engine: Any,
) -> Iterator[Served]:
    from eulerstack.inference.routes import Api
    from eulerstack.inference.server import Server
    from eulerstack.inference.service import Service

    service = Service(Engine(model, slots, prefill=16, **engine), queue)
    api = Api(service, tokenizer or Bytes(), model.spec.model.name, key, body)
    server = Server(api, drain)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", api, server, thread)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped mini with drawn weights."""
    folder = tmp_path_factory.mktemp("serve") / "checkpoint"
    es.save_checkpoint(es.build(es.load(MINI)), folder)
    return folder


@contextmanager
def process(checkpoint: Path, *options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server on a free port, and its address."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "eulerstack",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        "0",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=env) as one:
        try:
            assert one.stdout is not None
            found = re.search(r"http://\S+", one.stdout.readline())
            assert found is not None
            yield found[0].removesuffix(","), one
        finally:
            one.kill()
