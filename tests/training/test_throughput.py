"""Tokens a second over whole steps, MFU where the peak is known, and the memory's peak."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eulerstack as es
from eulerstack.devices import DEVICES, recognise
from eulerstack.layers.share import Share
from eulerstack.training import throughput
from eulerstack.training.throughput import Throughput, peak_memory

ROWS, TOKENS = 4, 32


@pytest.fixture
def run(stack_file: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that is set by hand, a trainer that counts, and what was logged."""
    module = es.StackModule(str(stack_file))
    found = SimpleNamespace(now=0.0, module=module, trainer=SimpleNamespace(global_step=0, world_size=1), logged={})
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(module, "log", lambda name, value, **_: found.logged.update({name: value}))
    return found


def batch_ends(run: Any, clock: Throughput, seconds: float, stepped: bool = True) -> None:
    run.now += seconds
    run.trainer.global_step += stepped
    tokens = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    clock.on_train_batch_end(run.trainer, run.module, None, SimpleNamespace(tokens=tokens), 0)  # type: ignore[arg-type]


def test_validation_does_not_count_and_accumulation_does(run: Any) -> None:
    clock = Throughput()
    clock.on_train_start(run.trainer, run.module)
    batch_ends(run, clock, 100.0)  # compiles
    assert "tokens_per_second" not in run.logged
    batch_ends(run, clock, 2.0, stepped=False)
    assert "tokens_per_second" not in run.logged
    clock.on_validation_start(run.trainer, run.module)
    run.now += 50
    clock.on_validation_end(run.trainer, run.module)
    batch_ends(run, clock, 2.0)
    assert run.logged["tokens_per_second"] == pytest.approx(2 * ROWS * TOKENS / 4)
    batch_ends(run, clock, 1.0)
    assert run.logged["tokens_per_second"] == pytest.approx(3 * ROWS * TOKENS / 5)
    for _ in range(throughput.WINDOW):
        batch_ends(run, clock, 0.5)
    assert run.logged["tokens_per_second"] == pytest.approx(ROWS * TOKENS / 0.5)
    assert "mfu" not in run.logged
    assert run.logged["peak_memory_gib"] * 2**30 == pytest.approx(peak_memory(torch.device("cpu")), rel=0.1)


def test_several_devices_share_tokens_and_peak(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of two that split each layer: twice the rows of one, over four peaks."""
    monkeypatch.setattr(run.module, "ranks", Share(0, 2))
    run.trainer.world_size = 4
    clock = Throughput(peak_flops=1e9)
    clock.on_train_start(run.trainer, run.module)
    batch_ends(run, clock, 1.0)
    batch_ends(run, clock, 0.25)
    assert run.logged["tokens_per_second"] == pytest.approx(2 * ROWS * TOKENS / 0.25)
    flops = 3 * 2 * ROWS * es.estimate(run.module.spec).flops(TOKENS)
    assert run.logged["mfu"] == pytest.approx(flops / 0.25 / 4e9)


def test_mfu_is_a_step_of_three_forwards_over_the_peak(run: Any) -> None:
    clock = Throughput(peak_flops=1e9)
    clock.on_train_start(run.trainer, run.module)
    batch_ends(run, clock, 1.0)
    batch_ends(run, clock, 0.25)
    flops = 3 * ROWS * es.estimate(run.module.spec).flops(TOKENS)
    assert run.logged["mfu"] == pytest.approx(flops / 0.25 / 1e9)
    with pytest.raises(ValueError, match="--peak_flops 0 must be above 0"):
        Throughput(0)


NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "Tesla T4": "t4",
    "NVIDIA H100 PCIe": None,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA A10G": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_only_a_device_of_the_table_has_a_peak(name: str) -> None:
    key = NAMES[name]
    found = recognise(name)
    assert found is None if key is None else found is not None and found.flops == DEVICES[key].flops
