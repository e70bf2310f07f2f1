"""What OpenAI's API answers: tokens as they come become pieces of text, and those whole answers or events."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tokens import Tokenizer
from .engine import Request
from .openai import Asked, Chat, Completion
from .sampling import Token
from .text import Text


@dataclass
class Score:
    """A token's name, where it stands in the text, how likely it was, and names of likely ones; None: not known."""

    name: str
    offset: int = 0
    logprob: float | None = None
    top: dict[str, float] | None = None


@dataclass
class Delta:
    """What one step adds to an answer."""

    index: int
    text: str
    scores: list[Score] = field(default_factory=list)
    finish: str | None = None


class Answer:
    """One answer on its way: tokens go in, Deltas come out."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer, stops: Sequence[str], asked: Asked) -> None:
        self.index, self.request, self.tokenizer = index, request, tokenizer
        self.scored = isinstance(asked, Completion) and asked.logprobs is not None
        self.echo = isinstance(asked, Completion) and asked.echo
        self.empty = isinstance(asked, Completion) and asked.max_tokens == 0
        said = request.text[: len(request.text) - len(request.prompt)] if self.echo else request.text
        self.text, self.begun = Text(tokenizer, stops, said), ""
        if self.echo and said:
            self.text.detokenizer.end()  # half a character that the last turn ended with was said
        self.held: list[Score] = []
        self.shown = self.count = self.told = 0
        self.finished = False

    def begin(self) -> None:
        """Read the prompt as text, before the first token comes."""
        if self.echo:
            self.begun = self.text.read(self.request.prompt)
        if self.scored:
            self.tokenizer.name(0)  # the first name takes a while, and here no one waits for it

    def take(self, token: int, finish: str | None) -> Delta:
        """What the next token adds; finish: why it is the last, if it is."""
        text = self._echoed()
        if not self.empty:
            self.count += 1
            text += self.text.add(token)
            if finish != "stop":  # a token that ends the text is none of it
                self._score(token)
        if finish is not None and not self.text.cut.met:
            text += self.text.end()
        if self.text.cut.met:
            finish = "stop"
        self.finished = finish is not None
        self.shown += len(text)
        return Delta(self.index, text, self._ready(), finish)

    def _echoed(self) -> str:
        """The prompt's text, once, and its scores: the first token has none, where nothing was said before it."""
        if not self.echo:
            return ""
        self.echo = False
        unscored = len(self.request.prompt) - len(self.request.scores)
        for token in (*self.request.prompt[:unscored], *self.request.scores):
            self._score(token)
        return self.begun

    def _score(self, token: int) -> None:
        if not self.scored:
            return
        score = Score(self.tokenizer.name(token))
        if isinstance(token, Token):
            score.logprob = token.logprob
            score.top = {self.tokenizer.name(i): p for i, p in (*token.top.items(), (token, token.logprob))}
        self.held.append(score)

    def _ready(self) -> list[Score]:
        """Scores of tokens whose text was shown; those behind a stop never are."""
        ready: list[Score] = []
        for score, offset in zip(self.held, self.text.offsets[self.told :], strict=False):
            if offset >= self.shown and (not self.finished or self.text.cut.met):
                break
            score.offset = offset
            ready.append(score)
        self.held = self.held[len(ready) :]
        self.told += len(ready)
        return ready


def joined(deltas: Iterable[Delta]) -> Delta:
    """An answer's Deltas as one."""
    parts = list(deltas)
    scores = [score for part in parts for score in part.scores]
    return Delta(parts[0].index, "".join(part.text for part in parts), scores, parts[-1].finish)


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Shape:
    """How a route's answers look, whole or as a stream's events; all of one request share an id."""

    def __init__(self, asked: Asked, model: str) -> None:
        self.chat, self.scored = isinstance(asked, Chat), isinstance(asked, Completion) and asked.logprobs is not None
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.model = int(time.time()), model

    def whole(self, answers: list[Delta], used: dict[str, int]) -> dict[str, Any]:
        said = [
            {"message": {"role": "assistant", "content": a.text}} if self.chat else {"text": a.text} for a in answers
        ]
        name = "chat.completion" if self.chat else "text_completion"
        return self._object(name, [self._choice(a, one) for a, one in zip(answers, said, strict=True)], usage=used)

    def event(self, delta: Delta) -> dict[str, Any]:
        said = {"delta": {"content": delta.text} if delta.text else {}} if self.chat else {"text": delta.text}
        return self._chunk([self._choice(delta, said)])

    def role(self, index: int) -> dict[str, Any]:
        """The event that begins an answer of the chat."""
        return self._chunk([self._choice(Delta(index, ""), {"delta": {"role": "assistant", "content": ""}})])

    def last(self, used: dict[str, int]) -> dict[str, Any]:
        """The event that tells the usage, where it was asked for."""
        return self._chunk([], usage=used)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self._object("chat.completion.chunk" if self.chat else "text_completion", choices, **more)

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def _choice(self, delta: Delta, said: dict[str, Any]) -> dict[str, Any]:
        logprobs = _logprobs(delta.scores) if self.scored else None
        return {"index": delta.index, **said, "logprobs": logprobs, "finish_reason": delta.finish}


def _logprobs(scores: list[Score]) -> dict[str, list[Any]]:
    return {
        "tokens": [score.name for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [score.top for score in scores],
        "text_offset": [score.offset for score in scores],
    }
