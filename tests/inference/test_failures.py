"""Failures of released engines, each as a small test that such a fault would not pass.

Those of a state alone (rollbacks, continuations, widths, beams) are in tests/test_state.py.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import eulerstack as es
from eulerstack.inference.engine import Engine, Request
from eulerstack.inference.generate import prefill

from ..conftest import close
from .ways import answer, asked, check

Build = Callable[..., es.Stack]

PROMPT = [(37 * i) % 251 for i in range(41)]
"""Longer than the mini's window, and no multiple of a chunk."""


def bits(state: es.StackState) -> list[torch.Tensor]:
    """Everything that a state holds."""
    return [state.length.clone(), *(t.clone() for layer in state.layers for t in layer.tensors().values())]


def same(one: es.StackState, other: es.StackState) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def test_the_state_is_cached_before_its_block_was_complete_under_chunked_prefill(build_mini: Build) -> None:
    """A released engine stored a prompt's state under the whole block's name while only part of it was read.

    Here, after every chunk, a slot's state is of exactly the tokens that its request says were read.
    """
    model = build_mini()
    engine = Engine(model, slots=2, max_tokens=60, prefill=9)
    request, ends = engine.submit(PROMPT, 3, temperature=0), []
    while request.read < len(PROMPT):
        engine.step()
        ends.append(request.read)
        assert engine.state.length.tolist() == [request.read, 0]
        logits, _ = model.recurrent(torch.tensor([[5]]), engine.state.select([0]))
        close(logits[0, -1], model.parallel(torch.tensor([[*PROMPT[: request.read], 5]]))[0, -1], 1e-12)
    assert ends == [9, 18, 27, 36, 41]


def test_a_mixed_prefill_and_decode_batch_skips_the_snapshot(build_mini: Build) -> None:
    """A released engine lost states in the steps that both read a prompt and wrote tokens.

    Here such a step leaves the rows of prompts whose turn it is not as they were, to the bit, and gives the others
    what they get alone.
    """
    model = build_mini()
    engine = Engine(model, slots=3, max_tokens=80, prefill=6)
    requests = [asked(engine, [1, 2], 25)]
    engine.step()
    requests += [asked(engine, PROMPT, 4), asked(engine, PROMPT[::-1], 4)]
    engine.step()
    mixed = 0
    while engine.reading:
        waits = list(engine.reading)[1:]
        before = engine.state.select(waits).snapshot()
        engine.step()
        assert same(engine.state.select(waits), before)
        mixed += len(waits)
    assert mixed >= 12
    while not engine.idle:
        engine.step()
    for request in requests:
        assert len(request.tokens) == request.max_new_tokens
        check(model, answer(request))


@pytest.mark.parametrize("seed", range(3))
def test_slots_leak(build_mini: Build, seed: int) -> None:
    """Slots of cancelled requests were never given back, until an engine served nobody.

    Here any storm of requests and cancellations ends in an empty engine, all of whose slots can be used.
    """
    dice, requests = random.Random(seed), list[Request]()
    engine = Engine(build_mini(), slots=3, max_tokens=60, prefill=5)
    for _ in range(150):
        if dice.random() < 0.5:
            requests.append(engine.submit(PROMPT[: dice.randint(1, 20)], dice.randint(1, 9), temperature=0))
        if requests and dice.random() < 0.4:
            engine.cancel(dice.choice(requests))
        if dice.random() < 0.6:
            engine.step()
        assert len(engine.active) <= 3 and set(engine.reading) <= set(engine.active)
    for request in requests:
        engine.cancel(request)
    assert engine.idle and not engine.active and not engine.reading and not engine.waiting
    assert all(request.finished for request in requests)
    more = [engine.submit([1], 2, temperature=0) for _ in range(3)]
    engine.step()
    assert len(engine.active) == 3
    while not engine.idle:
        engine.step()
    assert {request.finished for request in more} == {"length"}


def test_a_pool_starved_while_gauges_look_healthy(build_mini: Build) -> None:
    """Requests waited for ever behind others while every gauge said that the engine worked.

    Here whoever comes is served before those who come after, however many they are and whatever is cancelled.
    """
    engine, dice = Engine(build_mini(), slots=2, max_tokens=60, prefill=8), random.Random(0)
    stream = [engine.submit(PROMPT[:20], 6, temperature=0) for _ in range(4)]
    engine.step()
    patient = engine.submit(PROMPT, 3, temperature=0)
    steps = 0
    while patient.finished is None:
        stream.append(engine.submit([steps], 6, temperature=0))
        if dice.random() < 0.3:
            engine.cancel(dice.choice(stream))
        engine.step()
        steps += 1
        assert steps < 40  # the stream never ends
    while not engine.idle:
        engine.step()
    assert {request.finished for request in stream} == {"length", "cancelled"}


def test_a_long_prompt_stalls_those_who_write_by_one_chunk_a_step_at_most(
    build_mini: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of a hundred thousand tokens made everybody's stream stand still until it was read.

    Here a step reads one chunk at most, and everyone who writes gets a token in it.
    """
    model, reads = build_mini(), list[int]()
    chunkwise = model.chunkwise

    def counted(ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        reads.append(ids.numel())
        return chunkwise(ids, *rest, **more)

    monkeypatch.setattr(model, "chunkwise", counted)
    engine = Engine(model, slots=4, max_tokens=200, prefill=8)
    writers = [engine.submit([i], 60, temperature=0) for i in range(2)]
    engine.step()
    engine.step()
    long = [engine.submit([2] * 120, 1, temperature=0) for _ in range(2)]
    while not all(request.finished for request in long):
        reads.clear()
        held = [len(writer.tokens) for writer in writers]
        engine.step()
        assert sum(reads) <= 8
        assert [len(writer.tokens) for writer in writers] == [count + 1 for count in held]


def test_right_padded_prefill_corrupts_a_recurrent_state(build_mini: Build) -> None:
    """A released Mamba-2 ran its scan over the padding of shorter prompts: a relative error of 0.47.

    Here a row's state after a right-padded prefill is that of its prompt alone.
    """
    model, prompts = build_mini(), [PROMPT, PROMPT[:3], PROMPT[:17]]
    with torch.inference_mode():
        _, state = prefill(model, prompts, 5)
        for row, prompt in enumerate(prompts):
            alone = model.init_state(1, len(PROMPT) + 5)
            _, alone = model.chunkwise(torch.tensor([prompt]), alone)
            for got, wanted in zip(state.select([row]).layers, alone.layers, strict=True):
                for name, tensor in wanted.tensors().items():
                    close(got.tensors()[name], tensor, 1e-12, name)
