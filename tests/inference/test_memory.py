"""The bytes of states are those of the estimate, and reading a long prompt takes no more than reading a short one."""

import pytest
from torch.profiler import ProfilerActivity, profile

import eulerstack as es
from eulerstack.inference import generate as module
from eulerstack.inference.engine import Engine
from eulerstack.state import RingState

from ..test_memory import peak
from .subjects import MINIS, mini

SIZES = [(1, 1), (3, 100), (2, 256), (5, 300), (1, 8192)]
"""Rows and tokens, below, at and above the windows of the minis."""


@pytest.mark.parametrize("name", MINIS)
def test_bytes_of_states_are_the_estimates(name: str) -> None:
    model, counted = es.build(es.load(name), device="meta"), es.estimate(es.load(name))
    for batch, tokens in SIZES:
        state, wanted = model.init_state(batch, tokens), counted.state_bytes(batch, tokens)
        assert {**state.bytes_by_kind(), "total": state.nbytes()} == wanted
    assert model.init_state(2, 100, rollback=5).nbytes() >= counted.state_bytes(2, 100)["total"]


def test_the_engine_and_generate_hold_what_the_estimate_counts() -> None:
    """With rings that are shorter than the text, before, amid and after it."""
    model = mini("every_mixer_mini")
    counted = es.estimate(model.spec).state_bytes(3, 40)["total"]
    engine = Engine(model, slots=3, max_tokens=40, prefill=9)
    assert engine.state.nbytes() == counted
    for length in (30, 2, 17, 25):
        engine.submit([7] * length, 8, temperature=0)
    while not engine.idle:
        engine.step()
        assert engine.state.nbytes() == counted
    rings = [layer for layer in engine.state.layers if isinstance(layer, RingState) and layer.window]
    assert [ring.slots for ring in rings] == [12]
    _, state = module.prefill(model, [[7] * 30, [7] * 4], room=10)
    assert state.nbytes() == es.estimate(model.spec).state_bytes(2, 40)["total"]


def beyond_the_state(model: es.Stack, tokens: int) -> int:
    """The peak of reading a prompt, without the state that it leaves behind."""
    prompt = [i % 256 for i in range(tokens)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        list(es.generate(model, [prompt], 1, temperature=0))
    return peak(seen) - model.init_state(1, tokens + 1).nbytes()


@pytest.mark.parametrize(
    "name",
    [
        "arch_advanced_retnet_mini",
        "arch_expert_research_mini",
        pytest.param("arch_advanced_mamba2_mini", marks=pytest.mark.slow),
        pytest.param("arch_beginner_llama_mini", marks=pytest.mark.slow),
        pytest.param("arch_intermediate_mistral_mini", marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_prompt_does_not_grow_with_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the state, whatever the length: but for its ids, and where a layer attends, one layer's cache."""
    monkeypatch.setattr(module, "PREFILL", 32)
    model = mini(name, window=None)
    list(es.generate(model, [[1] * 64], 1))  # what is made once is not the prompt's
    # Beyond 512 keys a kernel's blocks are full.
    short, long = (beyond_the_state(model, times * module.PREFILL) for times in (20, 36))
    rings = [layer for layer in model.init_state(1, 1153).layers if isinstance(layer, RingState)]
    cache = max((sum(ring.bytes_by_kind().values()) for ring in rings), default=0)
    assert long <= short + cache + 16 * 512
