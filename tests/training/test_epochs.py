"""What the Trainer's overfit_batches and reload_dataloaders_every_n_epochs make of the order, resumed runs among it."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import eulerstack as es
from eulerstack.data.order import InOrder, InStreams, Mixed, Repeated, Shuffled

from .conftest import QUIET
from .reader import Reader, rows_of, text_data

Rows = list[list[int]]
pytestmark = pytest.mark.usefixtures("lightnings_own_warnings")

KINDS: dict[str, dict[str, Any]] = {
    "cut": {},
    "packed": {"packing": "packed"},
    "carried": {"carry_state": True},
    "by workers": {"workers": 2},
}


@pytest.fixture(autouse=True)
def any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Reader carries no state."""
    monkeypatch.setattr("eulerstack.training.data.check_carries", lambda *_: None)


def read(
    corpus: Path, steps: int, resume: Path | None = None, data: dict[str, Any] | None = None, **options: Any
) -> tuple[Rows, Rows]:
    """The rows of the batches that a run trains on, and those that it validates on; it leaves STEPS.ckpt."""
    reader = Reader()
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, **{**QUIET, "limit_val_batches": 0, **options})
    trainer.fit(reader, text_data(str(corpus), str(corpus.parent), **(data or {})), ckpt_path=resume)
    trainer.save_checkpoint(corpus.parent / f"{steps}.ckpt")
    return reader.read["train"], reader.read["held_out"]


@pytest.mark.parametrize("kind", KINDS)
def test_overfit_batches_are_the_same_in_each_epoch(corpus: Path, kind: str) -> None:
    found, held = read(corpus, 12, data=KINDS[kind], overfit_batches=3)
    assert found == found[:3] * 4
    assert len({row for batch in found[:3] for row in batch}) == 12
    assert len(held) == 4 * 3 and held == held[:3] * 4
    parts = (read(corpus, 5, data=KINDS[kind], overfit_batches=3)[0], corpus.parent / "5.ckpt")
    assert parts[0] + read(corpus, 12, parts[1], data=KINDS[kind], overfit_batches=3)[0] == found


def test_overfit_batches_are_the_first_of_the_text(corpus: Path) -> None:
    made = text_data(str(corpus), str(corpus.parent))
    made.setup()
    rows = Shuffled(len(made._sets("train")[0]), 4, None)
    loader = made._batches("train", made.train_dataloader().rows, rows, [source.share for source in made.sources])
    first = [rows_of(batch) for batch, _ in zip(loader, range(2), strict=False)]
    assert read(corpus, 4, overfit_batches=2)[0] == first * 2
    every = len(rows)
    assert len({tuple(batch) for batch in read(corpus, every + 2, overfit_batches=1.0)[0]}) == every


def test_a_mixture_is_overfitted_in_its_shares(corpus: Path) -> None:
    sources = [{"path": str(corpus), "weight": 3, "pattern": f"{i}*.txt"} for i in (0, 1)]
    made = es.TextData(sources=sources, seed=5, seq_len=50, batch_size=4, cache_dir=str(corpus.parent / "cache"))
    reader = Reader()
    L.Trainer(max_epochs=3, overfit_batches=2, **QUIET).fit(reader, made)
    assert reader.read["train"] == reader.read["train"][:2] * 3
    first = made.shards[0]["train"].size // 50
    order = Mixed([first, 40], [source.share for source in made.sources], 4, None)
    assert [order.batch(at) for at in range(2)] == [[0, first, 1, first + 1], [2, first + 2, 3, first + 3]]


def test_orders_without_a_seed_are_those_of_the_rows() -> None:
    assert [*Shuffled(10, 3, None)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert InStreams(9, 3, None).batch(4) == [1, 4, 7]
    both = [Repeated(Shuffled(10, 4, None, (rank, 2)), 2, 5) for rank in (0, 1)]
    assert [[*a, *b] for a, b in zip(*both, strict=True)] == [*Shuffled(10, 4, None)]
    assert InOrder(3, 2).batch(1) == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_loaders_that_are_made_again_go_on_in_the_order(corpus: Path, kind: str) -> None:
    """Also without data.seed, and in a resumed run."""
    again = {"limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1, "data": KINDS[kind]}
    straight = read(corpus, 9, limit_train_batches=2, data=KINDS[kind])[0]
    assert len({tuple(batch) for batch in straight}) == 9
    assert read(corpus, 9, **again)[0] == straight
    for stop in (4, 5):
        begun = read(corpus, stop, **again)[0]
        assert begun + read(corpus, 9, corpus.parent / f"{stop}.ckpt", **again)[0] == straight


class Drawing(Reader):
    """Seeds each batch anew, as a StackModule does."""

    def on_train_batch_start(self, batch: object, index: int) -> None:
        torch.manual_seed(self.trainer.global_step)


def test_a_loader_that_is_made_again_keeps_the_seed_that_was_drawn(corpus: Path) -> None:
    found = []
    for every in (0, 1):
        L.seed_everything(3, verbose=False)
        made = es.TextData(str(corpus), seq_len=50, batch_size=4, cache_dir=str(corpus.parent / "cache"))
        trainer = L.Trainer(
            max_epochs=4, limit_train_batches=2, limit_val_batches=0, reload_dataloaders_every_n_epochs=every, **QUIET
        )
        reader = Drawing()
        trainer.fit(reader, made)
        found.append(reader.read["train"])
    assert found[0] == found[1]


def test_another_run_of_the_same_data_begins_anew(corpus: Path) -> None:
    made = text_data(str(corpus), str(corpus.parent))
    found = []
    for _ in range(2):
        reader = Reader()
        L.Trainer(max_steps=3, limit_val_batches=0, **QUIET).fit(reader, made)
        found.append(reader.read["train"])
    assert found[0] == found[1]
