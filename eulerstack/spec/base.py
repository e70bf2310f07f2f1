"""The base of every block of the language: frozen, strict, unknown keys refused."""

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict


class UnknownValueError(AttributeError):
    """A key was read whose value is wrong, and said to be: what depends on it cannot be judged."""


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise UnknownValueError(name)
            return super().__getattr__(name)
