"""estimate: what it tells, what fits a device, and the width of a fair twin."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import Result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eulerstack as es
from eulerstack.cli.estimate import figures
from eulerstack.devices import DEVICES, USABLE
from eulerstack.memory import count_step

MINI = "arch_expert_research_mini"


def test_json_has_what_the_table_shows(eulerstack: Callable[..., Result]) -> None:
    done = eulerstack("estimate", MINI, "--batch", "2", "--tokens", "64", "--device", "a100", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    model = es.build(es.load(MINI))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["state_bytes"]["total"] == model.init_state(2, 64).nbytes()
    memory = found["training_memory"]["none"]
    assert memory["total"] == sum(memory[k] for k in ("weights", "gradients", "optimizer", "activations", "work"))
    assert memory["total"] > found["training_memory"]["block"]["total"]
    table = eulerstack("estimate", MINI, "--batch", "2", "--tokens", "64", "--device", "a100").stdout
    assert all(f"{number:,}" in table for number in (found["parameters"], memory["total"], found["training_flops"]))


@pytest.mark.parametrize("name", ["arch_beginner_llama_mini", "arch_beginner_gpt2_mini"])
def test_flops_are_those_of_a_counted_run(name: str) -> None:
    model, ids = es.build(es.load(name)), torch.zeros(1, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids)
    assert es.estimate(model.spec).flops(16) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_largest_batch_fits_and_one_more_does_not(batch: int) -> None:
    spec, room = es.load(MINI), DEVICES["l4"].memory * USABLE
    rows = figures(spec, batch, 1024, "l4", "32-true")["device"]["largest_training_batch"]
    totals = [count_step(spec, n, 1024, device="cuda").memory().total for n in (rows, rows + 1)]
    assert totals[0] <= room < totals[1]


def test_the_weights_at_inference_are_those_of_the_built_model() -> None:
    spec = es.load(MINI, ["model.dtype=bfloat16"])
    weights = es.build(spec).parameters()
    assert figures(spec, 1, 64, None, "32-true")["weight_bytes"] == sum(w.numel() * w.element_size() for w in weights)


def test_a_twin_has_as_many_parameters(eulerstack: Callable[..., Result]) -> None:
    changes = ["--set", "layer_schedule.0.repeat=5", "--match", f"parameters={MINI}"]
    found = json.loads(eulerstack("estimate", f"{MINI}_retnet", *changes, "--json").stdout)
    setting = f"model.mlp_ratio={found['mlp_ratio']!r}"
    assert f"--set {setting} gives it" in eulerstack("estimate", f"{MINI}_retnet", *changes).stdout
    twin = es.load(f"{MINI}_retnet", ["layer_schedule.0.repeat=5", setting])
    assert es.estimate(twin).parameters == found["parameters"] == pytest.approx(found["goal"], rel=0.01)
    assert found["goal"] == es.estimate(es.load(MINI)).parameters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h1000"], "did you mean 'h100'?"),
        (["--device", "abacus"], "use one of a100"),
        (["--precision", "fp8"], "--precision 'fp8': use one of 32-true"),
        (["--match", "flops=x"], "write --match parameters=FILE"),
        (["--match", "parameters=llm_16b_simple"], "change model.d_model or the number of layers first"),
        (["--tokens", "1000000"], "more than model.max_seq_len"),
    ],
)
def test_what_cannot_be_told_is_a_sentence(eulerstack: Callable[..., Result], words: list[Any], message: str) -> None:
    done = eulerstack("estimate", MINI, *words)
    assert done.exit_code == 2
    assert message in done.stderr
