"""Steps that are recorded give to the bit what steps that are taken give, and what cannot be recorded is taken."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import eulerstack as es
from eulerstack.inference import steps
from eulerstack.inference.steps import Steps

from .subjects import MINIS, loud, mini

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


@pytest.mark.parametrize("of_all", [False, True])
def test_hooks_are_called_whenever_they_come(of_all: bool) -> None:
    model, seen = mini("arch_expert_falcon_h1_mini"), list[Tensor]()
    register = register_module_forward_hook if of_all else model.norm.register_forward_hook
    step, state = Steps(model), model.init_state(1, 40)
    for i in range(12):
        if i == 7:
            assert step.recorded
            hook = register(lambda module, *call: seen.append(call[1]) if module is model.norm else None)
        _, state = step(torch.tensor([[1]]), state)
    hook.remove()
    assert len(seen) == 5


def changed_in_place(model: es.Stack) -> None:
    for weight in model.parameters():
        weight.mul_(1.1)


def moved(model: es.Stack) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.1


def loaded(model: es.Stack) -> None:
    model.load_state_dict({name: weight * 1.1 for name, weight in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [changed_in_place, moved, loaded])
@pytest.mark.parametrize("name", ["arch_expert_falcon_h1_mini", "arch_expert_striped_hyena_mini"])
def test_weights_are_read_where_they_are_and_as_they_are(name: str, change: Callable[[es.Stack], None]) -> None:
    """A recording read the memory that weights had lain in, and hyena's filter as it had been made of them."""
    found = []
    for make in (Steps, never):
        with torch.inference_mode(False):
            model = loud(es.load(name))
        step, state = make(model), model.init_state(2, 60)
        for i in range(12):
            if i == 8:
                assert bool(step.recorded) == (make is Steps)
                with torch.inference_mode(False), torch.no_grad():
                    change(model)
            logits, state = step(torch.tensor([[i], [3]]), state)
            found.append(logits.clone())
    assert all(map(torch.equal, found[:12], found[12:]))


class Coded(Tensor):
    """A weight that stands for others, as those in 8 bits do."""

    code: Tensor

    @staticmethod
    def of(weight: Tensor) -> "Coded":
        made = Tensor._make_wrapper_subclass(Coded, weight.shape, dtype=weight.dtype)
        made.code = weight
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*[one.code if isinstance(one, Coded) else one for one in args], **(kwargs or {}))
        return Coded.of(found) if func is torch.ops.aten.detach.default else found


def test_weights_that_stand_for_others_are_not_recorded() -> None:
    with torch.inference_mode(False):
        model = loud(es.load("arch_expert_falcon_h1_mini"))
        for part in model.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight = torch.nn.Parameter(Coded.of(part.weight.detach()), requires_grad=False)
    step = Steps(model)
    for got, wanted in zip(told(model, step), told(model, never(model)), strict=True):
        assert torch.equal(got, wanted)
    assert not step.recorded


@pytest.mark.parametrize("other", [torch.autocast("cpu", torch.bfloat16), torch.inference_mode(False)])
def test_steps_heed_the_modes_of_each_time(other: Any) -> None:
    model, found = mini("arch_expert_falcon_h1_mini"), []
    for make in (Steps, never):
        step, state = make(model), model.init_state(2, 60)
        for i in range(12):
            with other if i in (7, 8) else nullcontext(), torch.no_grad():
                logits, state = step(torch.tensor([[i], [3]]), state)
            found.append(logits.clone())
    assert all(map(torch.equal, found[:12], found[12:]))


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
