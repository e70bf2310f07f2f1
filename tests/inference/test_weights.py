"""What an engine and its sessions keep of a model follows the model's weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import eulerstack as es

PROMPT = [1 + 7 * i % 250 for i in range(40)]


def built(seed: int = 0) -> es.Stack:
    torch.manual_seed(seed)
    builder = es.StackBuilder(d_model=32, n_heads=4, vocab_size=256, max_seq_len=128)
    return builder.add("attention").add("retnet").add("hyena", {"filter_hidden": 8}).build().eval()


def by_data(model: es.Stack) -> None:
    for weight in model.parameters():
        weight.data.copy_(weight.detach() * 1.5)


def by_assignment(model: es.Stack) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.5


def by_loading(model: es.Stack) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


def by_one_layer(model: es.Stack) -> None:
    """As a merged adapter does."""
    model.layers["0"].mixer.q_proj.weight.data.mul_(-2)


def by_another_module(model: es.Stack) -> None:
    model.layers["0"].mixer.v_proj = nn.Linear(32, 32, bias=False)


CHANGES: list[Callable[[es.Stack], None]] = [by_data, by_assignment, by_loading, by_one_layer, by_another_module]


def answer(engine: es.Engine, session: str | None = None) -> list[int]:
    request = engine.submit(PROMPT, 8, session=session, temperature=0)
    while not engine.idle:
        engine.step()
    return request.tokens


@pytest.mark.parametrize("change", CHANGES)
def test_prefixes_of_other_weights_are_not_used(change: Callable[[es.Stack], None]) -> None:
    model = built()
    engine = es.Engine(model, slots=2, prefill=8, prefix_bytes=1 << 24)
    first = answer(engine)
    assert answer(engine) == first
    assert engine.prefixes.hits == 1
    change(model)
    wanted = answer(es.Engine(model, slots=2, prefill=8))
    assert answer(engine) == wanted
    assert engine.prefixes.hits == 1
    assert answer(engine) == wanted
    assert engine.prefixes.hits == 2


def test_what_was_read_with_two_sets_of_weights_is_not_shared() -> None:
    model = built()
    engine = es.Engine(model, slots=2, prefill=8, prefix_bytes=1 << 24)
    early = engine.submit(PROMPT, 8, temperature=0)
    engine.step()
    by_data(model)
    late = engine.submit(PROMPT, 8, temperature=0)
    while not engine.idle:
        engine.step()
    assert early.tokens
    assert late.tokens == answer(es.Engine(model, slots=2, prefill=8))
    assert answer(engine) == late.tokens


@pytest.mark.parametrize("change", CHANGES)
def test_sessions_of_other_weights_are_refused(change: Callable[[es.Stack], None], tmp_path: Path) -> None:
    model = built()
    engine = es.Engine(model, slots=2, sessions=es.Sessions(tmp_path, model))
    answer(engine, "a")
    change(model)
    with pytest.raises(ValueError, match="weights"):
        engine.submit(PROMPT, 8, session="a")
    answer(engine, "b")
    assert es.Sessions(tmp_path, model).resume("b")
