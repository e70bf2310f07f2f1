"""What OpenAI's API asks: the fields of its requests, and the shape of its errors."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import from_json


class RefusedError(Exception):
    """A request that is answered with an error: a sentence, the field it is about, and a code for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self)[:1000], "type": kind, "param": self.param, "code": self.code}}


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One prompt becomes a list of one."""
    rows = value if isinstance(value, list) and not all(type(item) is int for item in value) else [value]
    texts = all(isinstance(row, str) for row in rows)
    if not texts and not all(isinstance(row, list) and all(type(item) is int for item in row) for row in rows):
        raise ValueError("must be a text, token ids, a list of texts or a list of lists of token ids")
    return rows


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a text or a list of up to 16 texts, none of them empty")
    return stops


class Fields(BaseModel):
    """An object of a request. `neutral`: other fields of the API, and the values at which they ask for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        others = cls.neutral.keys() - cls.model_fields.keys()
        return {key: value for key, value in data.items() if key not in others or not _is_one(value, cls.neutral[key])}


def _is_one(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether the value is one of these, and of its type: 0.0 is 0, but false is not."""
    return any(value == one and type(value) in _kinds(one) for one in values)


def _kinds(value: Any) -> tuple[type, ...]:
    return (int, float) if type(value) is int else (type(value),)


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Asked(Fields):
    """What both routes take."""

    neutral = {
        "best_of": (1,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "suffix": ("",),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
    }
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Annotated[list[str], PlainValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None

    def sampling(self, number: int) -> dict[str, Any]:
        """Sampling's rules for the answer of this number: each is drawn with a seed of its own."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        seed = None if self.seed is None else self.seed + number
        return {**{name: getattr(self, name) for name in names}, "seed": seed}


class Completion(Asked):
    """/v1/completions"""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    session: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None


class Part(Fields):
    type: Literal["text"]
    text: str


class Message(Fields):
    neutral = {"annotations": ([],), "refusal": ("",), "tool_calls": ([],)}
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _answer_without_text(cls, data: Any) -> Any:
        """The client's own answers are sent back as history, and one of them may have no content."""
        return {"content": "", **data} if isinstance(data, dict) and data.get("role") == "assistant" else data

    def line(self) -> str:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return f"{self.role}: {text.strip()}\n"


class Chat(Asked):
    """/v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def prompt(self) -> str:
        """A line a message, `role: content`, and then the assistant's turn, which ends where a user's begins."""
        return "".join(message.line() for message in self.messages) + "assistant:"


TURN = "\nuser:"
"""Where an answer of the chat ends: the model has begun to write the user's part."""

T = TypeVar("T", bound=Asked)


def read(body: bytes, kind: type[T]) -> T:
    """A request's body as its fields. Raises RefusedError, which names the first field that is wrong."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise RefusedError(400, 'the body must be a JSON object, as in {"prompt": "def "}')
    try:
        return kind.model_validate(_without_nulls(data))
    except ValidationError as error:
        raise _refusal(error) from None


def _without_nulls(data: Any) -> Any:
    """The same without the fields, at any depth, that are null. A null in a list stays: it is one of its values."""
    if isinstance(data, dict):
        return {key: _without_nulls(value) for key, value in data.items() if value is not None}
    return [_without_nulls(value) for value in data] if isinstance(data, list) else data


def _refusal(error: ValidationError) -> RefusedError:
    first = error.errors(include_url=False)[0]
    param = ".".join(map(str, first["loc"][:3])) or None
    if first["type"] == "extra_forbidden" and first["loc"][-1] in {*Asked.neutral, *Message.neutral}:
        return RefusedError(
            400, f"{param} = {first['input']!r:.80} is not supported; leave it out", param, "unsupported_parameter"
        )
    if first["type"] == "extra_forbidden":
        return RefusedError(
            400, f"{param!a:.80} is no field that is known here; leave it out", param, "unknown_parameter"
        )
    if first["type"] == "missing":
        return RefusedError(400, f"{param} is missing; give it", param, "missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    return RefusedError(400, f"{param} = {first['input']!r:.80}: {reason[:1].lower()}{reason[1:]}", param)
