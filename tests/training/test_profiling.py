"""The profile of a few steps: a trace, and a table whose parts are all but the whole of a step."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import eulerstack as es
from eulerstack.training.profiling import STEPS, WARM, Profile, step_flops

from .conftest import QUIET

pytestmark = [
    pytest.mark.usefixtures("lightnings_own_warnings"),
    pytest.mark.filterwarnings("ignore:.*Profiler.*"),
]


def recorded(
    stack_file: Path, corpus: Path, tmp_path: Path, steps: int = WARM + STEPS, carry_state: bool = False, **options: Any
) -> es.Stack:
    module = es.StackModule(str(stack_file), **options)
    data = es.TextData(
        str(corpus), seq_len=256, batch_size=4, cache_dir=str(tmp_path / "cache"), carry_state=carry_state
    )
    watcher = Profile(tmp_path / "profile")
    trainer = L.Trainer(
        max_steps=steps, accumulate_grad_batches=2, val_check_interval=2, limit_val_batches=1, callbacks=[watcher],
        check_val_every_n_epoch=None, default_root_dir=tmp_path, **QUIET,
    )  # fmt: skip
    trainer.fit(module, data)
    return module.model


WAYS: list[dict[str, Any]] = [{}, {"checkpointing": "selective"}, {"carry_state": True}]


@pytest.mark.parametrize("way", [WAYS[0], *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:])])
def test_the_parts_are_the_step(way: dict[str, Any], stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    stack = recorded(stack_file, corpus, tmp_path, **way)
    lines = [re.split(" {2,}", line) for line in (tmp_path / "profile" / "table.txt").read_text().splitlines()]
    cells = {name: row for name, *row in lines[1:]}
    layers = {"mamba", "retnet", "attention", "ffn: gated_mlp", "norms"}
    assert set(cells) == layers | {"embedding", "head and loss", "optimizer", "data", "residual stream"} | {
        "everything else",
        "a step",
    }
    shares = {name: float(row[2].rstrip("%")) / 100 for name, row in cells.items()}
    assert sum(share for name, share in shares.items() if name not in ("everything else", "a step")) > 0.85
    assert all(float(cells[name][1]) > 0.2 * float(cells[name][0]) > 0 for name in layers)  # forward and backward
    batch = sum(step_flops(stack, 4, 256).values()) / 1e9
    assert batch < float(cells["a step"][3]) <= 2.01 * batch  # an epoch's last step may have one batch
    names = {
        event.get("name") for event in json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    }
    assert {"eulerstack::mamba", "eulerstack::attention"} <= names
    assert not {"losses", "losses_from"} & set(vars(stack)) and "chunkwise" not in vars(stack.blocks[0].mixer)
    assert not stack.blocks[0].mixer._forward_hooks


def test_flops_are_those_that_mfu_counts() -> None:
    for name in ("arch_expert_research_mini", "arch_expert_mixtral_moe_mini"):
        stack = es.build(es.load(name), "meta")
        assert sum(step_flops(stack, 3, 64).values()) == 3 * 3 * stack.flops(64, training=True)


def test_what_cannot_be_recorded_is_a_sentence(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--profile records 5 steps after 5, and this run has 9"):
        recorded(stack_file, corpus, tmp_path, steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"--profile measures the parts of layers, which --model\.compile melts"):
            recorded(stack_file, corpus, tmp_path, compile=True, kernels="torch")
