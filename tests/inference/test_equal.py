"""However a text is generated through the state, it is what computing the whole text anew at every token gives."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import eulerstack as es
from eulerstack.inference import steps
from eulerstack.inference.engine import Engine, Request
from eulerstack.inference.generate import prefill
from eulerstack.inference.sampling import Sampler, Sampling

from .subjects import MINIS, ROOM, loud, mini, stacks
from .ways import WAYS, Written, answer, asked, check, distribution, recomputed

QUICK = ["arch_expert_falcon_h1_mini", "arch_intermediate_gemma2_mini", "every_mixer_mini"]
DRAWN: dict[str, Any] = {"suppress_health_check": list(HealthCheck)}

minis = pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MINIS])
ways = pytest.mark.parametrize("way", WAYS)


def texts(*lengths: int) -> list[list[int]]:
    dice = random.Random(sum(lengths))
    return [[dice.randrange(256) for _ in range(length)] for length in lengths]


def agree(model: es.Stack, way: str, prompts: list[list[int]], count: int) -> None:
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "SPAN", 8)  # so that texts outgrow several
        for written in WAYS[way](model, prompts, count):
            check(model, written)


@minis
@ways
def test_a_mini_writes_what_recomputing_gives(name: str, way: str) -> None:
    agree(mini(name), way, texts(26, 1, 9), 6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["chunked", "left padded", "served", "remembered"])
@pytest.mark.parametrize("name", MINIS)
def test_a_mini_writes_what_recomputing_gives_beyond_its_own_windows(name: str, way: str) -> None:
    agree(mini(name, window=None), way, texts(300, 70, 255), 5)


@ways
@settings(max_examples=10, **DRAWN)
@given(spec=stacks(), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_any_stack_writes_what_recomputing_gives(way: str, spec: es.StackSpec, lengths: list[int]) -> None:
    agree(loud(spec), way, texts(*lengths), 8)


@pytest.mark.slow
@ways
@settings(max_examples=100, **DRAWN)
@given(spec=stacks(), seed=st.integers(0, 99), lengths=st.lists(st.integers(1, ROOM - 16), min_size=1, max_size=4))
def test_any_stack_writes_what_recomputing_gives_at_length(
    way: str, spec: es.StackSpec, seed: int, lengths: list[int]
) -> None:
    agree(loud(spec, seed=seed), way, texts(*lengths), 9)


@minis
def test_the_reference_is_a_recompute_at_every_token(name: str) -> None:
    """One pass over a text gives what a pass over each of its beginnings ends in, and the past matters."""
    model, (text,) = mini(name), texts(33)
    with torch.inference_mode():
        whole = model.parallel(torch.tensor([text]))[0]
        largest = whole.abs().max()
        for end in (1, 2, 20, 33):
            last = model.parallel(torch.tensor([text[:end]]))[0, -1]
            assert (whole[end - 1] - last).abs().max() <= 1e-5 * largest
        without = model.parallel(torch.tensor([text[-1:]]))[0, -1]
        assert (whole[-1] - without).abs().max() > 0.1 * largest


@minis
def test_echo_scores_a_prompt_as_recomputing_does(name: str) -> None:
    model, (prompt,) = mini(name), texts(26)
    engine = Engine(model, slots=2, max_tokens=30, prefill=7)
    request, _ = asked(engine, prompt, 2, echo=True), asked(engine, prompt[:3], 4)
    finish(engine)
    scores = Written(prompt[:1], prompt[1:], distribution(request.scores, 256))
    check(model, scores, greedy=False)
    assert [int(token) for token in request.scores] == prompt[1:]


def finish(engine: Engine) -> None:
    for _ in range(5000):
        if engine.idle:
            break
        engine.step()
    assert engine.idle and not engine.active and not engine.reading and not engine.waiting


Event = tuple[int, int, int] | int | None
"""A prompt's tokens that others begin with too, its own, and those it asks for; who is cancelled; or a step."""

EVENTS = st.lists(
    st.tuples(st.sampled_from([0, 8, 24]), st.integers(1, 28), st.integers(1, 12))
    | st.integers(0, 20)
    | st.none()
    | st.none(),
    max_size=60,
)


def play(engine: Engine, events: list[Event]) -> Iterator[Request]:
    (trunk,), requests = texts(24), list[Request]()
    for event in events:
        if isinstance(event, tuple):
            requests.append(asked(engine, trunk[: event[0]] + texts(event[1])[0], event[2]))
        elif event is None:
            engine.step()
        elif requests:
            engine.cancel(requests[event % len(requests)])
    finish(engine)
    yield from requests


def arrivals(spec: es.StackSpec, slots: int, chunk: int, store: int | None, events: list[Event]) -> None:
    model = loud(spec)
    for request in play(Engine(model, slots, ROOM, prefill=chunk, prefix_bytes=store), events):
        check(model, answer(request))
        assert request.finished == "cancelled" or len(request.tokens) == request.max_new_tokens


SCHEDULE = {
    "slots": st.integers(1, 4),
    "chunk": st.integers(1, 50),
    "store": st.sampled_from([None, 2_000, 20_000, 1_000_000]),
    "events": EVENTS,
}


@settings(max_examples=15, **DRAWN)
@given(spec=stacks(), **SCHEDULE)
def test_any_arrivals_and_cancellations(
    spec: es.StackSpec, slots: int, chunk: int, store: int | None, events: list[Event]
) -> None:
    arrivals(spec, slots, chunk, store, events)


@pytest.mark.slow
@settings(max_examples=100, **DRAWN)
@given(spec=stacks(), **SCHEDULE)
def test_any_arrivals_and_cancellations_at_length(
    spec: es.StackSpec, slots: int, chunk: int, store: int | None, events: list[Event]
) -> None:
    arrivals(spec, slots, chunk, store, events)


RULES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([None, 5]),
        "top_p": st.sampled_from([None, 0.9]),
        "min_p": st.sampled_from([None, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
    }
)


def drawn_alike(spec: es.StackSpec, rules: list[dict[str, Any]]) -> None:
    """In float64, where no chance falls on the edge between two tokens."""
    model = loud(spec, torch.float64)
    engine = Engine(model, slots=2, max_tokens=ROOM, prefill=8)
    requests = [engine.submit(*texts(5 + 9 * i), 10, **rule) for i, rule in enumerate(rules)]
    finish(engine)
    for request, rule in zip(requests, rules, strict=True):
        assert request.tokens == [step[0] for step in es.generate(model, [request.prompt], 10, **rule)]
        logits, sampler = recomputed(model, request.prompt, request.tokens), Sampler(1, 256, torch.device("cpu"))
        sampler.put(0, Sampling(**rule), request.prompt)
        assert request.tokens == [sampler(row[None], [0])[0] for row in logits]


@settings(max_examples=10, **DRAWN)
@given(spec=stacks(), rules=st.lists(RULES, min_size=1, max_size=5))
def test_a_seed_draws_the_same_in_the_engine_alone_and_from_a_recompute(
    spec: es.StackSpec, rules: list[dict[str, Any]]
) -> None:
    drawn_alike(spec, rules)


@pytest.mark.slow
@settings(max_examples=60, **DRAWN)
@given(spec=stacks(), rules=st.lists(RULES, min_size=1, max_size=5))
def test_a_seed_draws_the_same_at_length(spec: es.StackSpec, rules: list[dict[str, Any]]) -> None:
    drawn_alike(spec, rules)


GO_ON = """
import sys, torch, eulerstack as es
from safetensors.torch import load_file, save_file
with torch.inference_mode():
    for folder in sys.argv[1:]:
        model = es.load_checkpoint(folder)
        state = es.StackState.load(f"{folder}/state.safetensors", model)
        ids, seen = [load_file(f"{folder}/last.safetensors")["ids"]], []
        for _ in range(6):
            out, state = model.recurrent(ids[-1][:, None], state)
            seen.append(out[:, -1])
            ids.append(seen[-1].argmax(-1))
        save_file({"ids": torch.stack(ids[1:]), "logits": torch.stack(seen)}, f"{folder}/written.safetensors")
"""


def resumed(models: list[es.Stack], prompts: list[list[int]], folder: Path) -> Iterator[tuple[es.Stack, Written]]:
    """Six tokens of each, written by one new process from the checkpoints and the states it is given."""
    homes = [folder / str(i) for i in range(len(models))]
    for model, home in zip(models, homes, strict=True):
        es.save_checkpoint(model, home)
        with torch.inference_mode():
            prefill(model, [prompt[:-1] for prompt in prompts], 7)[1].save(home / "state.safetensors", model)
        save_file({"ids": torch.tensor([prompt[-1] for prompt in prompts])}, home / "last.safetensors")
    done = subprocess.run([sys.executable, "-c", GO_ON, *map(str, homes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for model, home in zip(models, homes, strict=True):
        written = load_file(home / "written.safetensors")
        for row, prompt in enumerate(prompts):
            yield model, Written(prompt, written["ids"][:, row].tolist(), written["logits"][:, row])


def some_stacks(count: int) -> list[es.Stack]:
    """Stacks as hypothesis draws them, all at once."""
    found: list[es.Stack] = []

    @settings(max_examples=count, phases=[Phase.generate], **DRAWN)
    @given(spec=stacks())
    def collect(spec: es.StackSpec) -> None:
        found.append(loud(spec))

    collect()
    return found


def test_a_saved_state_goes_on_in_a_new_process(tmp_path: Path) -> None:
    for model, written in resumed([*map(mini, QUICK), *some_stacks(6)], texts(26, 2, 9), tmp_path):
        check(model, written)


@pytest.mark.slow
def test_saved_states_of_all_go_on_in_a_new_process(tmp_path: Path) -> None:
    for model, written in resumed([*map(mini, MINIS), *some_stacks(100)], texts(40, 2, 17), tmp_path):
        check(model, written)
