"""Steps that are recorded give to the bit what steps that are taken give, and what cannot be recorded is taken."""

import math
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import eulerstack as es
from eulerstack.inference import steps
from eulerstack.inference.steps import Steps

from .subjects import MINIS, mini

pytest.importorskip("numba")

EXPERTS = ["every_mixer_mini", *(name for name in MINIS if "moe" in name or "jamba" in name)]
QUICK = ["arch_expert_falcon_h1_mini", "arch_expert_research_mini", "arch_expert_striped_hyena_mini", *EXPERTS[:1]]
ROWS, TOKENS = 3, 60

minis = pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MINIS])


@pytest.fixture(autouse=True)
def in_spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(steps, "SPAN", 16)
    with torch.inference_mode():
        yield


def never(model: es.Stack) -> Steps:
    """Steps that are all taken."""
    step = Steps(model)
    step.left = math.inf
    return step


def told(model: es.Stack, step: Steps) -> list[Tensor]:
    """Logits of many steps, and the state after them: rows pause, and one begins anew on the way."""
    dice, state = torch.Generator().manual_seed(0), model.init_state(ROWS, TOKENS)
    fresh, found = model.init_state(1, TOKENS), []
    for i in range(TOKENS - 1):
        if i == 23:
            state = state.put([1], fresh)
        real = torch.rand(ROWS, 1, generator=dice) < 0.7 if i % 5 in (2, 3) else None
        logits, state = step(torch.randint(0, 200, (ROWS, 1), generator=dice), state, real)
        found.append(logits.clone() if real is None else logits[real[:, 0]])
    return [*found, state.length, *(t for layer in state.layers for t in layer.tensors().values())]


@minis
def test_a_recorded_step_is_the_step_to_the_bit(name: str) -> None:
    model = mini(name)
    step = Steps(model)
    for got, wanted in zip(told(model, step), told(model, never(model)), strict=True):
        assert torch.equal(got, wanted)
    assert bool(step.recorded) == (name not in EXPERTS)


@pytest.mark.parametrize("name", ["every_mixer_mini", "arch_expert_falcon_h1_mini"])
def test_steps_say_what_the_model_says_when_there_is_no_room(name: str) -> None:
    model = mini(name)
    step, state = Steps(model), model.init_state(1, 20)
    for _ in range(20):
        _, state = step(torch.tensor([[1]]), state)
    with pytest.raises(ValueError, match="20") as refused:
        model.recurrent(torch.tensor([[1]]), state)
    with pytest.raises(ValueError, match="20") as mine:
        step(torch.tensor([[1]]), state)
    assert str(mine.value) == str(refused.value)


def test_a_state_from_elsewhere_is_not_fed_through_the_memory_of_another() -> None:
    model = mini("arch_expert_falcon_h1_mini")
    step, state = Steps(model), model.init_state(1, 40)
    for _ in range(8):
        _, state = step(torch.tensor([[1]]), state)
    assert step.recorded
    other, before = state.snapshot(), state.length.tolist()
    logits, other = step(torch.tensor([[2]]), other)
    assert state.length.tolist() == before
    assert torch.equal(logits, step(torch.tensor([[2]]), state)[0])


def test_hooks_are_called_whenever_they_come() -> None:
    model, seen = mini("arch_expert_falcon_h1_mini"), []
    step, state = Steps(model), model.init_state(1, 40)
    for i in range(12):
        if i == 7:
            assert step.recorded
            hook = model.norm.register_forward_hook(lambda *call: seen.append(call[2]))
        _, state = step(torch.tensor([[1]]), state)
    hook.remove()
    assert len(seen) == 5


class Theirs(es.Stack):
    """A stack with a part that is not ours."""


def test_what_is_not_ours_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mini("arch_expert_falcon_h1_mini")
    monkeypatch.setattr(model, "__class__", Theirs)
    step = Steps(model)
    told(model, step)
    assert not step.recorded


@pytest.mark.parametrize("lacking", ["eulerstack.kernels.recording", "eulerstack.kernels.compiled"])
def test_without_numba_steps_are_taken(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.setitem(sys.modules, lacking, None)
    model = mini("arch_expert_falcon_h1_mini")
    step = Steps(model)
    for got, wanted in zip(told(model, step), told(model, never(model)), strict=True):
        assert torch.equal(got, wanted)
    assert not step.recorded
