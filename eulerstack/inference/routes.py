"""OpenAI's routes over an engine, by FastAPI."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..tokens import Tokenizer
from .answers import Answer, Delta, Shape, joined, usage
from .openai import TURN, Asked, Chat, Completion, RefusedError, read
from .service import Job, Service

T = TypeVar("T", bound=Asked)

log = logging.getLogger(__name__)


class Api:
    """The routes. name: the model's; key: the bearer key that /v1 asks for, if any; body: bytes of a request."""

    def __init__(self, service: Service, tokenizer: Tokenizer, name: str, key: str | None, body: int) -> None:
        self.service, self.engine, self.tokenizer = service, service.engine, tokenizer
        self.name, self.key, self.body = name, key, body
        self.started = int(time.time())
        self.statuses: Counter[str] = Counter()
        self.tokens_in = self.tokens_out = 0

    def app(self) -> ASGIApp:
        app = FastAPI(openapi_url=None, lifespan=self._run)
        locked = [Depends(self._check_key)]
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], dependencies=locked)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], dependencies=locked)
        app.add_api_route("/v1/models", self.models, dependencies=locked)
        app.add_api_route("/v1/models/{name}", self.model, dependencies=locked)
        app.add_api_route("/health", self.health)
        app.add_api_route("/metrics", self.metrics)
        for kind in (RefusedError, HTTPException, ClientDisconnect, Exception):
            app.add_exception_handler(kind, _error)
        return self._counted(app)

    async def completions(self, request: Request) -> Response:
        asked = await self._asked(request, Completion)
        if asked.max_tokens == 0 and not asked.echo:
            raise RefusedError(400, "max_tokens = 0 writes nothing without echo; give 1 or more", "max_tokens")
        if asked.session is not None:
            self._check_session(asked, asked.session)
        return await self._answer(request, asked, list(asked.prompt), asked.max_tokens or 1)

    async def chat(self, request: Request) -> Response:
        asked = await self._asked(request, Chat)
        asked.stop = [*asked.stop, TURN]
        prompt, wanted = asked.prompt(), asked.max_completion_tokens or asked.max_tokens
        return await self._answer(request, asked, [prompt], wanted)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.model(self.name)]}

    def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "eulerstack"}

    def health(self) -> Response:
        closing = self.service.closing
        return JSONResponse({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    def metrics(self) -> Response:
        return PlainTextResponse(
            "".join(f"{line}\n" for line in self._metrics()), media_type="text/plain; version=0.0.4"
        )

    async def _asked(self, request: Request, kind: type[T]) -> T:
        """The request's fields. Raises RefusedError."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "the body must be JSON; send it with Content-Type: application/json")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.body:
                raise RefusedError(413, f"the body is longer than {self.body} bytes; send less, or raise --body")
        asked = await asyncio.to_thread(read, bytes(body), kind)
        if asked.model is not None:
            self._check_model(asked.model)
        return asked

    async def _answer(
        self, request: Request, asked: Asked, prompts: list[str | list[int]], wanted: int | None
    ) -> Response:
        rows = await asyncio.to_thread(self._rows, asked, prompts, wanted)
        try:
            job = await self.service.submit(rows)
        except ValueError as error:  # the engine's: what can never be served
            raise RefusedError(400, str(error)) from None
        self.tokens_in += sum(len(row["prompt"]) for row in rows[:: asked.n])
        shape = Shape(asked, self.name)
        answers = [Answer(i, one, self.tokenizer, asked.stop, asked) for i, one in enumerate(job.requests)]
        if asked.stream:
            return Stream(self._events(job, answers, shape, asked), job)
        with contextlib.closing(job):
            deltas = await _unless_gone(request, self._collect(job, answers))
        return JSONResponse(shape.whole(deltas, self._usage(answers, asked.n))) if deltas else Response(status_code=499)

    def _rows(self, asked: Asked, prompts: list[str | list[int]], wanted: int | None) -> list[dict[str, Any]]:
        """What the engine is to do: each prompt n times. Raises RefusedError."""
        most, room = self.engine.state.max_tokens, self.service.room
        if len(prompts) * asked.n > room:
            raise RefusedError(400, f"{len(prompts)} prompts of n = {asked.n} are more answers than fit ({room})", "n")
        scores = asked.logprobs if isinstance(asked, Completion) else None
        echo = isinstance(asked, Completion) and asked.echo and scores is not None
        session = asked.session if isinstance(asked, Completion) else None
        rows = []
        for prompt in prompts:
            ids = self._ids(prompt, session) if isinstance(prompt, str) else prompt
            count = max(1, most - len(ids)) if wanted is None else wanted
            if len(ids) + count > most:
                message = f"{len(ids)} tokens of prompt and {count} to write are more than the {most} that fit"
                raise RefusedError(400, f"{message}; shorten them", "max_tokens", "context_length_exceeded")
            row = {
                "prompt": ids,
                "max_new_tokens": count,
                "stop": self.tokenizer.stops,
                "echo": echo,
                "logprobs": scores,
                "session": session,
            }
            rows += [{**row, **asked.sampling(k)} for k in range(asked.n)]
        return rows

    def _ids(self, text: str, session: str | None) -> list[int]:
        """A prompt's ids; a turn that goes on with a session begins no document."""
        try:
            ids, sessions = self.tokenizer.encode(text), self.engine.sessions
        except ValueError as error:
            raise RefusedError(400, f"prompt: {error}", "prompt") from None
        resumed = session is not None and sessions is not None and session in sessions
        return ids[1:] if self.tokenizer.begins and resumed else ids

    async def _deltas(self, job: Job, answers: list[Answer]) -> AsyncIterator[Delta]:
        """What the steps add to the answers of a job, until all are finished. Raises RefusedError."""
        for answer in answers:
            await asyncio.to_thread(answer.begin)
        while not all(answer.finished for answer in answers):
            index, token, finish = await job.events.get()
            if isinstance(token, Exception):
                raise token
            if answers[index].finished:
                continue  # it met a stop, and the thread had not heard of it
            self.tokens_out += not answers[index].empty
            delta = answers[index].take(token, finish)
            if delta.finish and not finish:
                self.service.cancel(job.requests[index])
            yield delta
        for request in job.requests:
            if request.unparked is not None:
                raise RefusedError(
                    500, f"session = {request.session!r} could not be parked: {request.unparked.strerror}"
                )

    async def _collect(self, job: Job, answers: list[Answer]) -> list[Delta]:
        deltas = [delta async for delta in self._deltas(job, answers)]
        return [joined(delta for delta in deltas if delta.index == i) for i in range(len(answers))]

    async def _events(self, job: Job, answers: list[Answer], shape: Shape, asked: Asked) -> AsyncIterator[str]:
        """Server-sent events: the answers in pieces, or what went wrong."""
        try:
            for answer in answers if shape.chat else ():
                yield _event(shape.role(answer.index))
            async for delta in self._deltas(job, answers):
                if delta.text or delta.scores or delta.finish:
                    yield _event(shape.event(delta))
            if asked.stream_options.include_usage:
                yield _event(shape.last(self._usage(answers, asked.n)))
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent: what went wrong, whatever it was, is the last event
            if not isinstance(error, RefusedError):
                log.exception("a stream failed")
            yield _event(_refused(error).body())

    def _usage(self, answers: list[Answer], n: int) -> dict[str, int]:
        return usage(sum(len(a.request.prompt) for a in answers[::n]), sum(answer.count for answer in answers))

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise RefusedError(
                404, f"model = {name!r:.80} is not served here; it is {self.name!r}", "model", "model_not_found"
            )

    def _check_session(self, asked: Completion, session: str) -> None:
        if self.engine.sessions is None:
            reason = "has no place: start the server with --sessions DIR"
        elif asked.stop:
            reason = "cannot go with stop, behind which it would go on; stop at max_tokens"
        elif len(asked.prompt) * asked.n > 1:
            reason = "goes with one prompt and n = 1"
        else:
            return
        raise RefusedError(400, f"session = {session!r} {reason}", "session")

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise RefusedError(
                401, "the key is wrong or missing; send Authorization: Bearer KEY", None, "invalid_api_key"
            )

    def _metrics(self) -> Iterator[str]:
        yield "# TYPE eulerstack_requests_total counter"
        for status, count in sorted(self.statuses.items()):
            yield f'eulerstack_requests_total{{status="{status}"}} {count}'
        for name, kind, value in self._values():
            yield f"# TYPE eulerstack_{name} {kind}"
            yield f"eulerstack_{name} {value}"

    def _values(self) -> Iterator[tuple[str, str, int]]:
        engine, store = self.engine, self.engine.prefixes
        yield from (
            ("prompt_tokens_total", "counter", self.tokens_in),
            ("generated_tokens_total", "counter", self.tokens_out),
            ("slots", "gauge", engine.slots),
            ("slots_in_use", "gauge", len(engine.active)),
            ("queue_length", "gauge", len(engine.waiting)),
            ("answers_open", "gauge", self.service.inside),
            ("state_bytes", "gauge", engine.state.nbytes()),
        )
        if store is not None:
            yield from (
                ("prefix_hits_total", "counter", store.hits),
                ("prefix_tokens_total", "counter", store.tokens_reused),
                ("prefix_evictions_total", "counter", store.evictions),
                ("prefix_bytes", "gauge", store.bytes),
            )

    def _counted(self, app: ASGIApp) -> ASGIApp:
        """The same, with every answer's status counted; 499 where the client left before there was one."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            status = "499"

            async def watched(message: Message) -> None:
                nonlocal status
                status = str(message["status"]) if message["type"] == "http.response.start" else status
                await send(message)

            try:
                await app(scope, receive, watched)
            finally:
                if scope["type"] == "http":
                    self.statuses[status] += 1

        return wrapped

    @contextlib.asynccontextmanager
    async def _run(self, app: FastAPI) -> AsyncIterator[None]:
        self.service.start()
        yield
        await asyncio.to_thread(self.service.stop)


class Stream(StreamingResponse):
    """Events of a job, which is closed whichever way the stream ends."""

    def __init__(self, events: AsyncIterator[str], job: Job) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self.job):
            await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, work: Any) -> Any:
    """What the work gives, or None if the client leaves before that."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _error(request: Request, error: Exception) -> Response:
    refused = _refused(error)
    headers = {"Retry-After": "1"} if refused.status in (429, 503) else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps(refused.body()).encode()
    return Response(body, refused.status, {**headers, **(getattr(error, "headers", None) or {})}, "application/json")


def _refused(error: Exception) -> RefusedError:
    """What the client is told of an error."""
    match error:
        case RefusedError():
            return error
        case HTTPException():
            return RefusedError(error.status_code, str(error.detail))
        case ClientDisconnect():
            return RefusedError(499, "the client left")
    return RefusedError(500, f"the server failed: {type(error).__name__}; its log has more")
