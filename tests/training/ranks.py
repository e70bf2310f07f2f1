"""Trains small stacks on the ranks of a launcher, or on one process: what test_ranks.py compares.

python -m tests.training.ranks FOLDER          reads FOLDER/cases.json, writes FOLDER/NAME.pt of each case
"""

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from eulerstack.data.batches import Batch, collate
from eulerstack.data.rows import Item
from eulerstack.spec import from_data
from eulerstack.training.module import StackModule
from eulerstack.training.strategy import FSDP2
from tests.training.conftest import QUIET

ROWS, TOKENS = 4, 24


class Rows:
    """Global batches of packed, ragged documents; a rank takes its share of each. Resumes where it was.

    sizes: rows of each batch. ragged: whether some rows have many more targets than others.
    """

    def __init__(self, module: StackModule, sizes: list[int], vocab: int, ragged: bool) -> None:
        self.module, self.sizes, self.vocab, self.ragged, self.taken = module, sizes, vocab, ragged, 0

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        ranks = self.module.ranks
        for number in range(self.taken, len(self.sizes)):
            self.taken = number + 1
            first, each = sum(self.sizes[:number]), self.sizes[number] // ranks.of
            items = [self.row(first + ranks.rank * each + row) for row in range(each)]
            yield collate(items, TOKENS, 1.0)

    def row(self, number: int) -> Item:
        rng = np.random.default_rng(number)
        ids = rng.integers(0, self.vocab, TOKENS + 1)
        document = np.sort(rng.integers(0, 4, TOKENS + 1))
        share = rng.uniform(0.1, 1) if self.ragged else 0.8
        return Item(ids, document, rng.random(TOKENS + 1) < share)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


class Watch(L.Callback):
    """The loss of each batch over all ranks, and each optimizer step's loss and gradients, before they are clipped."""

    def __init__(self, gradients: bool) -> None:
        self.losses: list[float] = []
        self.steps: list[dict[str, Any]] = []
        self.wanted = gradients

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))
        if self.steps and "loss" not in self.steps[-1]:
            self.steps[-1]["loss"] = self.losses[-1]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if self.wanted:
            self.steps.append({"grads": {name: whole(p.grad) for name, p in module.model.named_parameters()}})


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How often gradients are summed over ranks and scattered."""
    done: list[int] = []
    true = _fsdp_param_group.foreach_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        return true(*args, **kwargs)

    _fsdp_param_group.foreach_reduce = counting
    try:
        yield done
    finally:
        _fsdp_param_group.foreach_reduce = true


def groups_of(module: StackModule) -> list[Any]:
    """The optimizer's groups by the names of their parameters."""
    names = {p: name for name, p in module.model.named_parameters()}
    optimizer = module.optimizers(use_pl_optimizer=False)
    return [(sorted(names[p] for p in g["params"]), g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups]


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.set_default_dtype(getattr(torch, case.get("dtype", "float64")))
    L.seed_everything(case.get("seed", 3), verbose=False)
    spec = from_data(case["spec"], "case")
    module = StackModule(spec, lr_peak=3e-3, schedule="constant", **case.get("options", {}))
    if case.get("weights") is not None:
        module.weights = Path(case["weights"])
    watch = Watch(case.get("gradients", True))
    strategy = FSDP2(case.get("tensor", 1)) if case["strategy"] == "fsdp2" else case["strategy"]
    trainer = L.Trainer(
        max_steps=case.get("steps", 3),
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=strategy,
        accumulate_grad_batches=case.get("accumulate", 1),
        precision=case.get("precision", "32-true"),
        callbacks=[watch],
        **QUIET,
    )
    rows = Rows(module, case.get("rows", [ROWS] * 100), spec.model.vocab_size, case.get("ragged", False))
    resumed = folder / case["resume"] if "resume" in case else None
    with counted() as reductions:
        trainer.fit(module, rows, ckpt_path=resumed, weights_only=True)
    if "save" in case:
        trainer.save_checkpoint(folder / case["save"])
    weights = {name: whole(p) for name, p in module.model.named_parameters()}
    dtypes = {name: str(p.dtype) for name, p in module.model.named_parameters()}
    return {
        "losses": watch.losses,
        "grads": watch.steps[0]["grads"] if watch.steps else None,
        "steps": watch.steps,
        "weights": weights,
        "groups": groups_of(module),
        "dtypes": dtypes,
        "reductions": len(reductions),
        "bits": float(trainer.callback_metrics.get("val_bits_per_byte", 0)),
    }


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for case in json.loads((folder / "cases.json").read_text()):
        with contextlib.redirect_stdout(io.StringIO()):
            found = train(case, folder)
        if os.environ.get("RANK", "0") == "0":
            torch.save(found, folder / f"{case['name']}.pt")
    if dist.is_initialized():  # a process that ends while gloo's threads run is aborted, now and then
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
