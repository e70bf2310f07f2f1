"""The memory of a training step, counted without numbers, against what the profiler saw the allocator give out."""

import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import eulerstack as es
from eulerstack import memory
from eulerstack.memory import count_step
from eulerstack.spec import with_hints
from eulerstack.training.optim import make_optimizer

MINIS = sorted(name for name in es.presets() if "mini" in name)
MAMBA1 = {"variant": "mamba1", "d_state": 4}
QUICK = ["arch_expert_research_mini", "arch_expert_mixtral_moe_mini"]


def measured(spec: es.StackSpec, batch: int, tokens: int) -> int:
    """The peak of two steps in Lightning's order, the loss of the step before still there in the second forward."""
    ids = torch.randint(0, spec.model.vocab_size, (batch, tokens))
    es.build(spec).losses(ids[:, :70], ids[:, :70])[0].backward()  # what is compiled once is not the step's
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        warnings.simplefilter("ignore")
        model = es.build(spec)
        optimizer = make_optimizer(model.named_parameters(), spec.training_hints)
        for _ in range(2):
            loss, parts = model.losses(ids, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            del loss, parts
    return peak(seen)


def peak(seen: profile) -> int:
    """The most bytes that were given out at once under a profile."""
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def check(spec: es.StackSpec, batch: int, tokens: int) -> None:
    policy = spec.training_hints.checkpointing
    counted, seen = count_step(spec, batch, tokens).memory(policy).total, measured(spec, batch, tokens)
    assert abs(counted / seen - 1) < 0.15, f"{spec.model.name}: counted {counted:,}, seen {seen:,}"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MINIS])
def test_a_step_is_counted_as_the_allocator_sees_it(name: str) -> None:
    check(es.load(name), 4, 192)


@pytest.mark.parametrize("shape", [(1, 64), (8, 256), pytest.param((1, 2048), marks=pytest.mark.slow)])
def test_at_any_batch_and_length(shape: tuple[int, int]) -> None:
    check(es.load("arch_expert_research_mini_retnet"), *shape)


@pytest.mark.parametrize("hints", [{"checkpointing": "block"}, {"optimizer": "hybrid"}, {"optimizer": "muon"}])
def test_with_checkpointing_and_other_optimizers(hints: dict[str, str]) -> None:
    check(with_hints(es.load("arch_expert_research_mini"), hints), 4, 256)


@pytest.mark.parametrize("name", QUICK)
def test_products_that_are_kept(name: str) -> None:
    """Between what keeps all and what keeps a layer's output."""
    check(with_hints(es.load(name), {"checkpointing": "selective"}), 4, 256)
    step = count_step(es.load(name), 4, 256)
    least, between, most = (step.memory(policy).total for policy in ("block", "selective", "none"))
    assert least < between < most


@pytest.mark.parametrize("optimizer", ["adamw", "hybrid"])
def test_where_weights_are_most_the_step_makes_nothing_more(optimizer: str) -> None:
    spec = es.load("arch_beginner_llama_mini", ["model.d_model=512", "model.n_heads=8"])
    spec = with_hints(spec, {"optimizer": optimizer})
    assert count_step(spec, 1, 16).memory().total == pytest.approx(measured(spec, 1, 16), rel=0.05)


def test_the_logits_of_all_tokens_never_stand_at_once() -> None:
    """32,000 words over 8,192 tokens: 1 GiB of logits in float32, and as much of their gradients."""
    spec = es.load("arch_beginner_llama_mini", ["model.vocab_size=32000", "model.max_seq_len=8192"])
    least = es.load("arch_beginner_llama_mini", ["model.vocab_size=256", "model.max_seq_len=8192"])
    more, less = (count_step(s, 1, 8192).memory().total for s in (spec, least))
    assert more - less < 8192 * 32000 * 4


@pytest.mark.slow
def test_a_long_step_is_counted_as_the_allocator_sees_it() -> None:
    check(es.load("every_mixer_mini"), 1, 2048)


def test_long_loops_are_drawn_out_to_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mask of a window beside them, which grows by the square."""
    branches = {"a": {"type": "attention", "attention": {"window": 64}}, "m": {"type": "mamba", "mamba": MAMBA1}}
    b = es.StackBuilder(d_model=64, n_heads=4).template(
        "b", mixer={"type": "branched", "branched": {"branches": branches}}
    )
    spec = b.layers("b").spec()
    drawn = count_step(spec, 1, 1536, device="cuda")
    monkeypatch.setattr(memory, "LOOPS", set())
    assert drawn.memory().total == pytest.approx(count_step(spec, 1, 1536, device="cuda").memory().total, rel=1e-3)


def test_weights_that_layers_share_are_counted_once() -> None:
    b = es.StackBuilder(d_model=64, n_heads=4)
    apart, together = b.add("retnet", repeat=2).spec(), None
    b = es.StackBuilder(d_model=64, n_heads=4).template("retnet", mixer={"type": "retnet", "retnet": {}})
    together = b.layers("retnet", repeat=2, shared="one").spec()
    one, two = (count_step(spec, 2, 64).memory() for spec in (together, apart))
    model = es.build(together)
    assert one.weights == sum(4 * p.numel() for p in model.parameters()) < two.weights
    assert one.activations == two.activations


def test_mixed_precision_keeps_less_and_counts_nothing_twice() -> None:
    spec = es.load("arch_expert_research_mini")
    full, mixed, half = (count_step(spec, 4, 256, p).memory() for p in ("32-true", "bf16-mixed", "bf16-true"))
    assert mixed.weights == full.weights > half.weights
    assert full.activations > mixed.activations > half.activations
