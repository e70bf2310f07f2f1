"""Steps of one token, recorded once (on a GPU as a CUDA graph) and replayed on memory that stays where it is."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.graphs import captured
from ..mixers import Mixer
from ..model import Stack
from ..segments import Segments
from ..state import StackState
from .weights import Parts

WARM = 1  # steps before one is recorded, which takes as long as four
SPAN = 256  # rows are read in so many tokens at once, or an eighth of theirs

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None] | None]]
"""Takes a step; returns its result, and what takes it again into the same memory, or None where that may differ."""


class _Recorded(NamedTuple):
    """A program, and what it reads and writes. room: how many tokens rows may hold after it. model: as it was then."""

    program: Callable[[], None]
    state: StackState
    tokens: Tensor
    real: Tensor | None
    logits: Tensor
    room: int
    model: object

    def serves(self, state: StackState, model: object) -> bool:
        mine = self.state
        same = mine.layers is state.layers and mine.length is state.length and mine.reach is state.reach
        return same and self.room == _room(state) and self.model == model


class Steps:
    """A model's `recurrent`, called many times with what it returned.

    A step is recorded when some were taken, and again when rows outgrow what it was recorded for, or where weights lie
    elsewhere, or modules were replaced; a write to weights in their place is read by what was recorded. Never recorded
    is a step that looks at numbers, as experts do that choose by them, that hooks look at, or of modules or weights
    that are not ours, which may compute where PyTorch does not see it. Recorded or not, rows are read up to the same
    bound, so that the numbers are the same. The logits stand until the next step.
    """

    def __init__(self, model: Stack) -> None:
        self.model = model
        self._look()

    def _look(self) -> None:
        """Note the modules of the model as they are now."""
        self.parts = Parts(self.model)
        modules = self.parts.modules
        of_all = [torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)] + of_all
        self.keeping = [m for m in modules if isinstance(m, Mixer) and type(m).memo is not Mixer.memo]
        known = all(type(m).__module__.split(".")[0] in ("eulerstack", "torch") for m in modules)
        known = known and not any("forward" in vars(m) for m in modules)
        self.left = WARM if known else math.inf  # steps before the first recording
        self.recorded: dict[bool, _Recorded] = {}

    def __call__(self, tokens: Tensor, state: StackState, real: Tensor | None = None) -> tuple[Tensor, StackState]:
        """Logits [B, V] of one token more, tokens [B, 1], and the state after it; real: [B, 1] bool."""
        if not self.parts.are_current():
            self._look()
        cast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        plain = torch.is_inference_mode_enabled() and not cast and not any(self.hooks)
        found = self.recorded.get(real is None) if plain else None
        self.left -= 1
        if found is not None and found.serves(state, self._model()):
            logits, after = self._replayed(found, tokens, real), state
        elif plain and self.left < 0 and (record := self._recorder()) is not None:
            logits, after = self._recorded(record, tokens, state, real)
        else:
            logits, after = self._taken(tokens, state, real)
        return logits, replace(after, bound=state.bound + 1)

    def _recorder(self) -> Recorder | None:
        """What records, where that can be."""
        tensors = [*self.parts.tensors()]
        ours = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        return _recorder({t.device.type for t in tensors}) if ours else None

    def _model(self) -> object:
        """Where each weight lies, for programs read them there, and what mixers made of them and keep."""
        kept = [mixer.memo() for mixer in self.keeping]
        return self.model.training, [*map(Tensor.data_ptr, self.parts.tensors())], kept

    def _taken(self, tokens: Tensor, state: StackState, real: Tensor | None) -> tuple[Tensor, StackState]:
        state = replace(state, bound=_room(state) - 1)
        logits, after = self.model.recurrent(tokens, state, None if real is None else Segments(real=real))
        return logits[:, -1], after

    def _replayed(self, found: _Recorded, tokens: Tensor, real: Tensor | None) -> Tensor:
        found.tokens.copy_(tokens)
        if found.real is not None and real is not None:
            found.real.copy_(real)
        found.program()
        return found.logits

    def _recorded(
        self, record: Recorder, tokens: Tensor, state: StackState, real: Tensor | None
    ) -> tuple[Tensor, StackState]:
        """The step; what it returns anew is written back where it was."""
        self.recorded.pop(real is None, None)
        tokens, real = tokens.clone(), None if real is None else real.clone()

        def step() -> Tensor:
            logits, after = self._taken(tokens, state, real)
            state.restore(after)
            return logits

        logits, program = record(step)
        if program is None:
            self.left = math.inf
        else:
            self.recorded[real is None] = _Recorded(program, state, tokens, real, logits, _room(state), self._model())
        return logits, state


def _room(state: StackState) -> int:
    """The tokens up to which a step reads rows: a whole number of spans, and no more than they can hold."""
    span = max(SPAN, 1 << state.bound.bit_length() >> 4)
    room = (state.bound // span + 1) * span
    return max(state.bound + 1, min(room, state.max_tokens)) if state.bounded else room


def _recorder(devices: set[str]) -> Recorder | None:
    """What records on these devices; on a CPU none without Numba or GNU's OpenMP."""
    if devices == {"cuda"}:
        return captured
    try:
        from ..kernels.compiled import openmp  # noqa: PLC0415 - Numba is an extra
        from ..kernels.recording import recorded  # noqa: PLC0415
    except ImportError:
        return None
    return recorded if devices == {"cpu"} and openmp() is not None else None
