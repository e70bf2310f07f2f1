"""The order of batches is the run's, not a rank's: shares, two processes under Lightning, resuming on another number."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eulerstack.data.order import InOrder, Order, Shuffled
from eulerstack.data.rows import NO_ROW

from .reader import rows_of, text_data


@pytest.mark.parametrize("of", [1, 2, 3, 6])
def test_ranks_share_each_batch(of: int) -> None:
    made = [Shuffled(40, 6, 7, (rank, of)) for rank in range(of)]
    for whole, *shares in zip(Shuffled(40, 6, 7), *made, strict=True):
        assert [row for share in shares for row in share] == whole


def test_ranks_take_as_many_steps_though_the_last_batch_is_short() -> None:
    made: list[Order] = [InOrder(9, 4, (rank, 2)) for rank in (0, 1)]
    assert [*made[0]] == [[0, 1], [4, 5], [8, NO_ROW]]
    assert [*made[1]] == [[2, 3], [6, 7], [NO_ROW, NO_ROW]]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size = 4 is no multiple of the 3 devices"):
        Shuffled(40, 4, 7, (0, 3))


def read(
    corpus: Path, devices: int, steps: int, resume: Path | None = None, stack: Path | None = None, **options: Any
) -> list[Any]:
    """What each rank reads in a run of so many steps, and then of the held-out rows; or the losses of a stack."""
    out = corpus.parent / f"out{devices}"
    out.mkdir(exist_ok=True)
    words = [corpus, out, devices, steps, resume or "", stack or "", json.dumps(options)]
    script = Path(__file__).with_name("reader.py")
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script, *map(str, words)], env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{steps}.{rank}.json").read_text()) for rank in range(devices)]


def joined(both: list[dict[str, Any]], what: str) -> list[list[int]]:
    return [[*a, *b] for a, b in zip(both[0][what], both[1][what], strict=True)]


def test_two_processes_read_what_one_reads(corpus: Path) -> None:
    """Lightning adds no sampler of its own, and tokens are made once; the place is in the checkpoint."""
    both = read(corpus, 2, 8)
    made = text_data(str(corpus), str(corpus.parent / "out2"))
    made.setup()
    alone = made.train_dataloader()
    rows = [rows_of(batch) for batch in alone]
    assert joined(both, "train") == rows[:8]
    held = [rows_of(batch) for batch in made.val_dataloader()]
    together = joined(both, "held_out")
    assert len(together) == len(held)
    assert [whole[: len(own)] for whole, own in zip(together, held, strict=True)] == held
    assert len(list((corpus.parent / "out2" / "cache").iterdir())) == 1
    run = torch.load(corpus.parent / "out2" / "8.ckpt", weights_only=True)
    alone.load_state_dict(run["loops"]["fit_loop"]["state_dict"]["combined_loader"][0])
    assert rows_of(next(iter(alone))) == rows[8]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_of_two_processes_goes_on_with_one(corpus: Path, workers: int) -> None:
    """Steps 0 to 8 on two, the rest on one, in the midst of an epoch."""
    both = read(corpus, 2, 8, workers=workers)
    rest = read(corpus, 1, 40, corpus.parent / "out2" / "8.ckpt", workers=workers)
    (alone,) = read(corpus, 1, 40, workers=workers)
    assert joined(both, "train") + rest[0]["train"] == alone["train"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"packing": "packed"}, {"carry_state": True}], ids=["cut", "packed", "carried"]
)
def test_losses_of_two_processes_go_on_on_one(corpus: Path, stack_file: Path, options: dict[str, Any]) -> None:
    """float64, with rows of ragged documents: each rank's mean is over other counts. Rounding grows as training goes."""
    both = read(corpus, 2, 8, stack=stack_file, **options)
    rest = read(corpus, 1, 20, corpus.parent / "out2" / "8.ckpt", stack_file, **options)
    (alone,) = read(corpus, 1, 20, stack=stack_file, **options)
    assert both[0] == both[1]
    assert len(alone) == 20
    assert [*both[0], *rest[0]] == pytest.approx(alone, rel=1e-9, abs=1e-9)
