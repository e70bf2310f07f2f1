"""One thread that steps the engine; requests come to it from an event loop, and tokens go back there."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from .engine import Engine, Request
from .openai import RefusedError

T = TypeVar("T")
Event = tuple[int, int | Exception, str | None]
"""The row of a job; its next token, or what went wrong; why it is the last."""

log = logging.getLogger(__name__)


class Service:
    """Jobs of one or more rows each, served by an engine that only its own thread touches.

    queue_length: rows that may wait for a slot; more are refused.
    """

    def __init__(self, engine: Engine, queue_length: int) -> None:
        self.engine, self.room = engine, engine.slots + queue_length
        self.inside = 0
        self.closing = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tell: dict[Request, Callable[[int | Exception, str | None], None]] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what still runs is dropped."""
        self._calls.put(None)
        self._thread.join()

    async def submit(self, rows: Sequence[dict[str, Any]]) -> "Job":
        """Queue rows, each the words of Engine.submit. Raises RefusedError, and the engine's ValueError."""
        if self.closing:
            raise closing()
        if self.inside + len(rows) > self.room:
            message = f"{self.inside} answers are open, and there is room for {self.room}; try again later"
            raise RefusedError(429, message, None, "queue_full")
        self.inside += len(rows)
        job = Job(self, len(rows))
        try:
            await self._ask(lambda: self._enter(rows, job))
        except BaseException:
            job.close()
            raise
        return job

    def cancel(self, *requests: Request) -> None:
        self._calls.put(lambda: self._drop(requests))

    def leave(self, job: "Job") -> None:
        """Cancel what still runs of a job, also where the thread has yet to meet it."""
        self.inside -= job.rows
        self._calls.put(lambda: self._drop(job.requests))

    def abort(self) -> None:
        """End everything that runs or waits: the server goes."""
        self._calls.put(lambda: self._fail([*self._tell], closing()))

    async def _ask(self, do: Callable[[], T]) -> T:
        """What `do` gives when the thread calls it between two steps."""
        answer: Future[T] = Future()

        def call() -> None:
            try:
                answer.set_result(do())
            except Exception as error:
                answer.set_exception(error)

        self._calls.put(call)
        return await asyncio.shield(asyncio.wrap_future(answer))

    def _enter(self, rows: Sequence[dict[str, Any]], job: "Job") -> None:
        for index, row in enumerate(rows):
            request = self.engine.submit(**row)
            job.requests.append(request)
            self._tell[request] = partial(job.put, index)

    def _work(self) -> None:
        while self._listen():
            try:
                got = self.engine.step()
            except Exception as error:
                log.exception("a step failed")
                held = [one for one in self._tell if one not in self.engine.waiting] or [*self._tell]
                message = (
                    f"the step that this request was in failed ({type(error).__name__}); the server's log has more"
                )
                self._fail(held, RefusedError(500, message))
            else:
                for request in got:
                    self._tell[request](request.tokens[-1], request.finished)
                    if request.finished:
                        del self._tell[request]

    def _listen(self) -> bool:
        """Take what was asked meanwhile, waiting for it where there is nothing to step; False when it is to end."""
        while self.engine.idle or not self._calls.empty():
            call = self._calls.get()
            if call is None:
                return False
            try:
                call()
            except Exception:  # without its thread the server would hang
                log.exception("what was asked between two steps failed")
        return True

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            self._tell[request](error, None)
        self._drop(requests)

    def _drop(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.engine.cancel(request)
            self._tell.pop(request, None)


class Job:
    """The rows that one client asked for at once, and their tokens as they come. Close it, whatever happened."""

    def __init__(self, service: Service, rows: int) -> None:
        self.service, self.rows, self.requests = service, rows, list[Request]()
        self.closed = False
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, index: int, token: int | Exception, finish: str | None) -> None:
        """Called by the service's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody listens
            self._loop.call_soon_threadsafe(self.events.put_nowait, (index, token, finish))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.service.leave(self)


def closing() -> RefusedError:
    """What is said when no request is taken, or finished, any more."""
    return RefusedError(503, "the server is shutting down", None, "closing")
