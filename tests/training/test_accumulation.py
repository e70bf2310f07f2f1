"""Accumulated batches, the ranks' batches and single ones: one gradient, whatever each batch has to take means over."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import eulerstack as es
from eulerstack.segments import IGNORED
from eulerstack.training.accumulation import Accumulation
from eulerstack.training.data import Batch

from .conftest import QUIET
from .test_ranks import WAYS, launched, stack

pytestmark = [
    pytest.mark.usefixtures("lightnings_own_warnings"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
]

EXACT = 1e-10
LOOKS_AHEAD = """
head: {type: causal_lm_mtp, mtp: {n_predict: 2, head_template: m}}
training_hints: {z_loss: 1e-3}
"""
EXPERTS = "ffn: {type: moe, moe: {experts: 4, top_k: 2, z_loss: 0.1, load_balance_coef: 0.0}}"


class See(L.Callback):
    """Keeps each step's gradient, and then leaves the weights as they are."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []
        self.counts: list[int] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, index: int) -> None:
        self.counts.append(int((batch.targets != IGNORED).sum()))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        found = [p.grad for p in module.parameters() if p.grad is not None]
        self.grads.append(torch.cat([grad.flatten() for grad in found]).clone())
        for grad in found:
            grad.zero_()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if len(self.grads) > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["loss"]))


Run = Callable[..., See]


@pytest.fixture
def run(stack_file: Path, tmp_path: Path) -> Run:
    """Gradients in float64 over prompts and completions of very different lengths."""
    draw, lines = random.Random(1), tmp_path / "lines.jsonl"
    texts = [{"prompt": "x" * draw.randrange(1, 28), "completion": "y" * draw.randrange(1, 20)} for _ in range(300)]
    lines.write_text("".join(json.dumps(text) + "\n" for text in texts))

    def seen(batch: int, accumulate: int, limit: int = 12, path: Path = lines, **options: Any) -> See:
        see = See()
        L.seed_everything(0, verbose=False)
        data = es.TextData(str(path), cache_dir=str(tmp_path / "k"), seq_len=32, batch_size=batch, seed=1, **options)
        limits = {"max_epochs": 1, "limit_train_batches": limit, "limit_val_batches": 0}
        trainer = L.Trainer(accumulate_grad_batches=accumulate, callbacks=[see], precision="64-true", **limits, **QUIET)  # type: ignore[arg-type]
        trainer.fit(es.StackModule(str(stack_file), weight_decay=0.0, kernels="torch"), data)
        return see

    return seen


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("packing", ["cut", "packed"])
@pytest.mark.parametrize("kind", ["plain", "ahead", "experts"])
def test_accumulated_batches_are_one(run: Run, stack_file: Path, kind: str, packing: str) -> None:
    text = stack_file.read_text()
    if kind == "ahead":
        stack_file.write_text(text.replace("head: {type: causal_lm}\n", LOOKS_AHEAD))
    if kind == "experts":
        stack_file.write_text(text.replace("ffn: {type: gated_mlp}", EXPERTS))
    whole = run(8, 1, 3, packing=packing)
    for batch in (4, 2):
        parts = run(batch, 8 // batch, 3 * 8 // batch, packing=packing)
        assert len(parts.grads) == len(whole.grads) == 3
        assert max(map(far, parts.grads, whole.grads)) < EXACT
        assert parts.losses == pytest.approx(whole.losses, rel=EXACT)


def test_an_epochs_last_step_is_divided_by_what_it_has(run: Run) -> None:
    alone, steps = run(2, 1, 5), run(2, 4, 5)
    assert len(steps.grads) == 2
    assert far(steps.grads[1], alone.grads[4]) < EXACT
    assert steps.losses[1] == pytest.approx(alone.losses[4], rel=EXACT)


def test_carried_state(run: Run, corpus: Path) -> None:
    """Batches that go on from each other: each weighs by its targets."""
    alone = run(3, 1, 7, path=corpus, carry_state=True)
    steps = run(3, 3, 7, path=corpus, carry_state=True)
    assert steps.counts == alone.counts and len(set(alone.counts)) > 1
    for step, grad in enumerate(steps.grads):
        each = range(3 * step, min(3 * step + 3, 7))
        counts = [alone.counts[i] for i in each]
        wanted = sum(n * alone.grads[i] for n, i in zip(counts, each, strict=True)) / sum(counts)
        assert far(grad, wanted) < EXACT  # type: ignore[arg-type]


def test_a_loader_of_ones_own_that_has_no_length(stack_file: Path) -> None:
    """Two batches of one row, four times as many targets in the second, and a last step of one."""

    class Endless(torch.utils.data.IterableDataset[Batch]):
        def __iter__(self) -> Any:
            for counted in (5, 20, 9):
                tokens = torch.arange(24)[None] * 7 % 256
                targets = torch.where(torch.arange(24) < counted, tokens + 1, IGNORED)
                yield Batch(tokens, targets, None, 1.0)

    def seen(accumulate: int) -> See:
        see = See()
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(max_steps=9, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[see], **QUIET)
        loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
        trainer.fit(es.StackModule(str(stack_file), weight_decay=0.0, kernels="torch"), loader)
        return see

    one, two = seen(1).grads, seen(2).grads
    assert far(two[0], (5 * one[0] + 20 * one[1]) / 25) < 1e-5
    assert far(two[1], one[2]) < 1e-5


def test_the_balance_of_experts_weighs_by_tokens() -> None:
    """A mean of ratios is not the ratio of means: docs/training.md says so."""
    step = Accumulation()
    step.begin([torch.tensor([30.0, 1.0]), torch.tensor([10.0, 1.0])])
    found = [
        step.weighted({"cross_entropy": torch.tensor(x), "load_balance": torch.tensor(x)}, lambda t: t)
        for x in (1.0, 2.0)
    ]
    assert [float(loss) for loss, _ in found] == [0.5 + 0.75, 1.0 + 0.5]
    assert [float(means["load_balance"]) for _, means in found] == [1.0, 1.25]
    assert [float(means["cross_entropy"]) for _, means in found] == [1.0, 1.5]


def test_a_step_without_targets_has_no_gradient() -> None:
    step = Accumulation()
    step.begin([torch.tensor([8.0, 0.0])] * 2)
    for _ in range(2):
        loss, means = step.weighted({"cross_entropy": torch.tensor(0.0)}, lambda t: t)
        assert float(loss) == float(means["cross_entropy"]) == 0


def test_ranks_that_accumulate_have_the_gradient_of_one_batch(tmp_path: Path) -> None:
    """Rows of very different counts, clipped; the second step is an epoch's last, of one batch."""
    spec = stack(
        "attention",
        "gated_retnet",
        "mamba2",
        head={"type": "causal_lm_mtp", "mtp": {"n_predict": 2, "head_template": "mamba2"}},
        training_hints={"z_loss": 1e-3, "grad_clip": 0.5, "router_aux_loss_coef": 0.0},
    )
    case: dict[str, Any] = {
        "spec": spec,
        "steps": 2,
        "strategy": "auto",
        "ragged": True,
        "options": {"kernels": "torch"},
    }
    whole = {**case, "name": "whole", "rows": [8, 4]}
    parts = {**case, "name": "parts", "rows": [2, 2, 2, 2, 2, 2], "accumulate": 4}
    one = launched(tmp_path / "one", [whole, parts], 1)
    shared = [{**case, **way, "name": name, "rows": [4, 4, 4], "accumulate": 2} for name, way in WAYS.items()]
    for found in (one["parts"], *launched(tmp_path / "two", shared, 2).values()):
        for got, wanted in zip(found["steps"], one["whole"]["steps"], strict=True):
            assert got["loss"] == pytest.approx(wanted["loss"], rel=EXACT)
            for name, grad in wanted["grads"].items():
                assert (got["grads"][name] - grad).abs().max() <= EXACT * grad.abs().max() + 1e-30, name


def test_a_checkpoint_in_the_middle_of_a_step_has_the_place_of_the_run(
    stack_file: Path, corpus: Path, tmp_path: Path
) -> None:
    """Though the batches of the step have been read to its end."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.total_batch_idx + 1}.ckpt")

    options = {"max_steps": 2, "accumulate_grad_batches": 3, "limit_val_batches": 0, "callbacks": [Save()]}
    data = es.TextData(str(corpus), cache_dir=str(tmp_path / "k"), seq_len=32, batch_size=4, seed=1)
    trainer = L.Trainer(default_root_dir=tmp_path, **options, **QUIET)  # type: ignore[arg-type]
    trainer.fit(es.StackModule(str(stack_file), kernels="torch"), data)
    for batches in range(1, 7):
        loops = torch.load(tmp_path / f"{batches}.ckpt", weights_only=True)["loops"]["fit_loop"]
        assert loops["state_dict"]["combined_loader"][0]["taken"] == batches
