"""Conversations that rest on disk between two turns: a file each, resumed by id."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ..model import Stack
from ..paths import expand_home
from ..state import PART, Saved, StackState
from .weights import WeightsWatch

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOKENS = "tokens"


class Sessions:
    """The conversations of one model in a folder, which belongs to one Sessions at a time.

    The weights are hashed here, and again when they were changed (see WeightsWatch): what was parked before is then
    refused.
    """

    def __init__(self, folder: str | Path, model: Stack) -> None:
        self.folder, self.model = expand_home(folder), _Hashed(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(f".*{PART}"):  # half written when a process was killed; files by earlier versions
            part.unlink() if part.is_file() else shutil.rmtree(part)

    def park(self, session: str, state: StackState, tokens: Sequence[int]) -> None:
        """Keep a conversation: all its tokens, and a state of one row that has read the first of them.

        Those that it has not read, such as the last one drawn, are read when the conversation goes on. Raises OSError
        where it cannot be written; what was parked before stays.
        """
        file = self._file(session)
        if state.batch != 1 or int(state.length) > len(tokens):
            raise ValueError(f"{len(tokens)} tokens do not go with a state of {state.length.tolist()} tokens a row")
        state.save(file, self.model, **{_TOKENS: torch.tensor([int(token) for token in tokens], dtype=torch.int32)})

    def open(self, session: str) -> tuple[list[int], Saved]:
        """All tokens of a conversation, and its state in its file; ValueError where there is none, or it is damaged."""
        saved = Saved.open(self._parked(session), self.model)
        if _TOKENS not in saved.tensors:
            raise ValueError(f"{saved.path} holds a state without its tokens: no session was parked in it")
        return saved.tensors[_TOKENS].tolist(), saved

    def resume(self, session: str, max_tokens: int | None = None) -> tuple[list[int], StackState]:
        """All tokens of a conversation, and the state that has read the first of them.

        max_tokens: how many the state has room for; as many as when it was parked by default.
        """
        tokens, saved = self.open(session)
        return tokens, saved.made(self.model, max_tokens)

    def forget(self, session: str) -> None:
        """Raises ValueError where there is none."""
        self._parked(session).unlink()

    def ids(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.safetensors") if _ID.fullmatch(file.stem))

    def __contains__(self, session: str) -> bool:
        return self._file(session).is_file()

    def _parked(self, session: str) -> Path:
        if session not in self:
            raise ValueError(f"no session is parked as {session!r} in {self.folder}")
        return self._file(session)

    def _file(self, session: str) -> Path:
        if not _ID.fullmatch(session):
            raise ValueError(f"session = {session!r} must be 1 to 64 letters, digits, '-' or '_'")
        return self.folder / f"{session}.safetensors"


class _Hashed:
    """A model as its states' files see it, its weights hashed when they were changed."""

    def __init__(self, model: Stack) -> None:
        self.init_state = model.init_state
        self._model, self._weights, self._hash = model, WeightsWatch(model), model.fingerprint()

    def fingerprint(self) -> str:
        if self._weights.changed():
            self._hash = self._model.fingerprint()
        return self._hash
