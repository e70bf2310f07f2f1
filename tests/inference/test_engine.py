"""The engine: what a request gets does not depend on who else is there, and is what generating alone gives."""

import random
from collections.abc import Callable

import pytest
import torch

import eulerstack as es
from eulerstack.inference.engine import Engine, Request

from ..conftest import close

Build = Callable[..., es.Stack]


def run(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    dice = random.Random(count)
    return [[dice.randrange(256) for _ in range(dice.randint(1, longest))] for _ in range(count)]


def recomputed(model: es.Stack, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        return [step[0] for step in es.generate(model, [prompt], count, temperature=0)]  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_and_cancellations_give_what_each_gets_alone(build_mini: Build, seed: int) -> None:
    model, dice = build_mini(), random.Random(seed)
    engine = Engine(model, slots=3, max_tokens=80, prefill=16)
    left, requests = prompts(14), list[Request]()
    while left or not engine.idle:
        if left and dice.random() < 0.4:
            requests.append(engine.submit(left.pop(), dice.randint(1, 20), temperature=0))
        if requests and dice.random() < 0.1:
            engine.cancel(dice.choice(requests))
        engine.step()
    assert {r.finished for r in requests} <= {"length", "cancelled"}
    for request in requests:
        wanted = recomputed(model, request.prompt, request.max_new_tokens)
        assert request.tokens == wanted[: len(request.tokens)]
        assert request.finished == "cancelled" or len(request.tokens) == request.max_new_tokens


def test_a_request_whose_tokens_are_penalised_can_be_cancelled(build_mini: Build) -> None:
    """What was said is noted where the steps made place for it, in inference mode; cancelling is outside."""
    engine = Engine(build_mini(), slots=2, max_tokens=80)
    gone, other = (engine.submit([1, 2, 3], 9, temperature=0, repetition_penalty=1.3) for _ in range(2))
    engine.step(), engine.step()
    engine.cancel(gone)
    run(engine)
    assert gone.finished == "cancelled" and len(other.tokens) == 9


def test_a_request_gets_the_same_tokens_alone_and_in_company(build_mini: Build) -> None:
    model = build_mini(torch.float32)
    rules = {"seed": 7, "logprobs": 4, "temperature": 0.9, "echo": True}
    alone = Engine(model, slots=4, max_tokens=80, prefill=16)
    one = alone.submit(prompts(1)[0], 20, **rules)
    run(alone)
    busy = Engine(model, slots=4, max_tokens=80, prefill=16)
    others = [busy.submit(p, 5 + i, temperature=1.0) for i, p in enumerate(prompts(6))]
    two = busy.submit(prompts(1)[0], 20, **rules)
    run(busy)
    assert two.tokens == one.tokens
    assert [t.top for t in two.scores] == [t.top for t in one.scores]  # prompts are read alone: the same bits
    close(*(torch.tensor([t.logprob for t in r.tokens]) for r in (two, one)), 1e-5)  # type: ignore[attr-defined]
    assert all(len(other.tokens) == other.max_new_tokens for other in others)


def test_echo_scores_the_prompt(build_mini: Build) -> None:
    model, prompt = build_mini(torch.float32), prompts(1)[0]
    engine = Engine(model, slots=2, max_tokens=80, prefill=7)
    request = engine.submit(prompt, 1, echo=True, logprobs=2, temperature=0)
    run(engine)
    scores = model(torch.tensor([prompt]))[0].log_softmax(-1)
    wanted = torch.stack([row[token] for row, token in zip(scores, prompt[1:], strict=False)])
    assert [int(token) for token in request.scores] == prompt[1:]
    close(torch.tensor([token.logprob for token in request.scores]), wanted.detach(), 1e-5)


def test_stops_end_a_request_and_free_its_slot(build_mini: Build) -> None:
    model, prompt = build_mini(), prompts(1)[0]
    free = recomputed(model, prompt, 12)
    engine = Engine(model, slots=1, max_tokens=80)
    first, second = (engine.submit(prompt, 12, temperature=0, stop=[free[4]]) for _ in range(2))
    run(engine)
    for request in (first, second):
        assert request.tokens == free[: free.index(free[4]) + 1]
        assert request.finished == "stop"
    assert engine.idle and not engine.active


def test_long_prompts_and_many_tokens_wait_for_each_other_no_more_than_a_chunk(build_mini: Build) -> None:
    engine = Engine(build_mini(), slots=3, max_tokens=200, prefill=8)
    writing = engine.submit([1], 60, temperature=0)
    engine.step()
    long, short = engine.submit([2] * 120, 1, temperature=0), engine.submit([3] * 9, 1, temperature=0)
    for step in range(1, 6):
        engine.step()
        assert len(writing.tokens) == 1 + step  # no step without a token
    assert short.finished == "length"  # two chunks, in turn with the long prompt's
    run(engine)
    assert long.finished == "length"


def test_slots_fill_the_budget_and_no_more(build_mini: Build) -> None:
    model = build_mini(torch.float32)
    each = es.estimate(model.spec).state_bytes(1, 64)["total"]
    assert Engine(model, slots=8, max_tokens=64, budget=3 * each + 5).state.nbytes() == 3 * each
    assert Engine(model, slots=2, max_tokens=64, budget=3 * each).slots == 2
    with pytest.raises(ValueError, match=f"do not hold one slot of {each}"):
        Engine(model, max_tokens=64, budget=each - 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [256]}, "ids from 256"),
        ({"prompt": [1] * 60, "max_new_tokens": 30}, "more than the 80 tokens of a slot"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"prompt": [1], "max_new_tokens": 3, "temperature": -1.0}, "temperature = -1.0"),
    ],
)
def test_what_can_never_be_served_is_refused_when_it_comes(
    build_mini: Build, given: dict[str, object], message: str
) -> None:
    engine = Engine(build_mini(), slots=1, max_tokens=80)
    with pytest.raises(ValueError, match=message):
        engine.submit(**given)  # type: ignore[arg-type]
    assert engine.idle
    with pytest.raises(ValueError, match="slots = 0"):
        Engine(build_mini(), slots=0)
