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
from .text import CONTEXT, Text


@dataclass
class Score:
    """A token's name, where it stands in the text, how likely it was, and names of likely ones; None: not known."""

    name: str
    offset: int
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
        self.text = Text(tokenizer, stops)
        self.scored = isinstance(asked, Completion) and asked.logprobs is not None
        self.echo = isinstance(asked, Completion) and asked.echo
        self.empty = isinstance(asked, Completion) and asked.max_tokens == 0
        self.begun: tuple[str, list[int]] = ("", [])
        self.held: list[Score] = []
        self.shown = self.count = 0
        self.finished = False

    def begin(self) -> None:
        """Read the prompt as text, before the first token comes."""
        if self.echo:
            self.begun = self.text.read(self.request.prompt)
        else:
            self.text.read(self.request.prompt[-CONTEXT:], count=False)

    def take(self, token: int, finish: str | None) -> Delta:
        """What the next token adds; finish: why it is the last, if it is."""
        text, self.begun = self._echoed(), ("", [])
        if not self.empty:
            self.count += 1
            text += self.text.add(token)
            self._score(token, self.text.offset)
        if self.text.cut.met:
            finish = "stop"
        elif finish is not None:
            text += self.text.end()
        self.finished = finish is not None
        self.shown += len(text)
        return Delta(self.index, text, self._ready(finish), finish)

    def _echoed(self) -> str:
        text, offsets = self.begun
        scores: list[int] = []
        if self.scored:  # the first has none, where nothing was said before it
            unscored = len(self.request.prompt) - len(self.request.scores)
            scores = [*self.request.prompt[:unscored], *self.request.scores]
        for token, offset in zip(scores, offsets, strict=False):
            self._score(token, offset)
        return text

    def _score(self, token: int, offset: int) -> None:
        if not self.scored:
            return
        score = Score(self.tokenizer.name(token), offset)
        if isinstance(token, Token):
            score.logprob, score.top = token.logprob, {}
            for other, logprob in (*token.top.items(), (token, token.logprob)):
                score.top.setdefault(self.tokenizer.name(other), logprob)
        self.held.append(score)

    def _ready(self, finish: str | None) -> list[Score]:
        """Scores of tokens whose text was shown; those behind a stop never are."""
        end = len(self.held)
        if finish != "length":
            end = sum(score.offset < self.shown for score in self.held)
        ready, self.held = self.held[:end], self.held[end:]
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
