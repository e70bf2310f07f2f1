"""What users of Lightning do with any module, they do with a StackModule."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner import Tuner

import eulerstack as es
from eulerstack.cli.train import run
from eulerstack.data.batches import Batch

from .conftest import QUIET
from .test_cli import fit_words

pytestmark = [
    pytest.mark.usefixtures("lightnings_own_warnings"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
]


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> es.TextData:
    return es.TextData(str(corpus), seq_len=32, batch_size=4, seed=7, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def module(stack_file: Path) -> es.StackModule:
    L.seed_everything(0, verbose=False)
    return es.StackModule(str(stack_file), kernels="torch")


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    return L.Trainer(default_root_dir=tmp_path, **{"limit_val_batches": 1, **QUIET, **options})


def test_a_test_after_fit(module: es.StackModule, data: es.TextData, tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=2)
    made.fit(module, data)
    (measured,) = made.test(module, data, verbose=False)
    (again,) = trainer(tmp_path).validate(module, data, verbose=False)
    assert 0 < measured["held_out_bits_per_byte"] < 9
    assert again.keys() == {"val_bits_per_byte"}
    with pytest.raises(ValueError, match="freshly drawn weights"):
        trainer(tmp_path).test(es.StackModule(module.spec, kernels="torch"), data, verbose=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_module_from_a_runs_file(module: es.StackModule, data: es.TextData, tmp_path: Path, precision: str) -> None:
    made = trainer(tmp_path, max_steps=2, precision=precision)
    made.fit(module, data)
    made.save_checkpoint(tmp_path / "last.ckpt")
    loaded = es.StackModule.load_from_checkpoint(tmp_path / "last.ckpt", kernels="torch", lr_peak=1e-4)
    assert loaded.spec.training_hints.lr_peak == 1e-4 and loaded.kernels == "torch"
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, module.model.state_dict()[name].to(weight.dtype)), name
    made.test(loaded, data, verbose=False)
    (tmp_path / "half.ckpt").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read, it is damaged"):
        es.StackModule.load_from_checkpoint(tmp_path / "half.ckpt")


def test_the_learning_rate_finder(module: es.StackModule, data: es.TextData, tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=40)
    weights = [p.detach().clone() for p in module.parameters()]
    finder = Tuner(made).lr_find(module, data, num_training=20, min_lr=1e-5, max_lr=1.0)
    assert finder is not None
    assert len(finder.results["lr"]) == 20
    assert module.lr == module.spec.training_hints.lr_peak == finder.suggestion()
    assert all(map(torch.equal, weights, module.parameters()))
    made.fit(module, data)
    assert made.global_step == 40
    assert made.lr_scheduler_configs[0].scheduler.base_lrs[0] == finder.suggestion()


class Ones(torch.utils.data.Dataset[Batch]):
    """Batches that are made elsewhere."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, at: int) -> Batch:
        if at >= self.batches:
            raise IndexError
        tokens = torch.arange(at, at + 25)[None]
        return Batch(tokens[:, :-1], tokens[:, 1:], None, 1.0)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 14),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 2, "max_steps": 5}, 5),
    ],
)
def test_loaders_of_ones_own(module: es.StackModule, tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    """The schedule is as long as the run: at its end the rate is at its floor."""
    made = trainer(tmp_path, **options)
    made.fit(module, torch.utils.data.DataLoader(Ones(7), batch_size=None))
    hints = module.spec.training_hints
    assert made.global_step == steps
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(hints.lr_peak * hints.lr_floor_ratio)


def test_time_alone(module: es.StackModule, tmp_path: Path) -> None:
    """The rate warms up over an epoch's share, stays, and that is said."""

    class Enough(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 50

    made = trainer(tmp_path, max_time={"hours": 1}, callbacks=[Enough()])
    with pytest.warns(UserWarning, match=r"max_time alone .* schedule = cosine .*give trainer\.max_steps as well"):
        made.fit(module, torch.utils.data.DataLoader(Ones(20), batch_size=None))
    assert made.global_step == 50
    assert made.optimizers[0].param_groups[0]["lr"] == module.spec.training_hints.lr_peak


def test_a_run_whose_length_is_unknown_is_refused(module: es.StackModule, tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Batch]):
        def __iter__(self) -> Any:
            yield from Ones(3)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    for options in ({"max_epochs": 2}, {"max_time": {"seconds": 9}}, {"max_epochs": -1}):
        with pytest.raises(ValueError, match=r"give trainer\.max_steps"):
            trainer(tmp_path, **options).fit(module, loader)


class Kept(DummyLogger):
    """Stands in for TensorBoard and W&B: what they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Any] = {}

    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        self.told = params


def test_loggers_get_the_hyperparameters(module: es.StackModule, data: es.TextData, tmp_path: Path) -> None:
    kept = Kept()
    made = trainer(tmp_path, max_steps=2, precision="bf16-mixed", accumulate_grad_batches=2, logger=kept)
    made.fit(module, data)
    wanted = {"name": "tiny", "kernels": "torch", "seed": 0, "schedule": "cosine", "lr_peak": module.lr}
    wanted |= {"seq_len": 32, "batch_size": 4, "data_seed": 7, "packing": "cut", "precision": "bf16-mixed"}
    wanted |= {"accumulate_grad_batches": 2, "max_steps": 2, "spec": es.dump(module.spec)}
    assert {key: kept.told[key] for key in wanted} == wanted


def fit_here(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["eulerstack"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run("fit", [*words[1:], "--model.kernels", "torch", "--trainer.enable_progress_bar", "false"])


def test_what_was_asked_for_is_said(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    """In a process of its own: Lightning speaks through the handlers that it made when it was imported."""
    from .test_cli import eulerstack

    words = [*fit_words(stack_file, corpus, str(tmp_path / "run"), 4), "--trainer.val_check_interval", "2"]
    words += ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--model.kernels", "torch"]
    words += ["--trainer.callbacks.monitor", "val_bits_per_byte", "--trainer.callbacks.verbose", "true"]
    done = eulerstack(*words, "--trainer.profiler", "simple", "--trainer.enable_progress_bar", "false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Metric val_bits_per_byte improved" in done.stderr
    assert "FIT Profiler Report" in done.stderr
    for noise in ("GPU available", "Tip:", "`Trainer.fit` stopped", "litlogger", "`weights_only` was not set"):
        assert noise not in done.stderr


def test_time_alone_at_the_command_line(
    stack_file: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not cut to the one epoch of a run without any limit."""
    words = fit_words(stack_file, corpus, str(tmp_path / "run"))
    at = words.index("--trainer.max_steps")
    words[at : at + 2] = ["--trainer.max_time", "00:00:00:00", "--trainer.limit_val_batches", "0"]
    seen: list[int | None] = []
    monkeypatch.setattr(
        es.StackModule, "on_fit_start", lambda self: seen.append(self.trainer.max_epochs), raising=False
    )
    fit_here(words, tmp_path, monkeypatch)
    assert seen == [-1]
