"""What a run tells arrives in the loggers that people look at."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from eulerstack.cli.train import run

TOLD = {"loss", "bits_per_byte", "grad_norm", "tokens_per_second", "mfu", "peak_memory_gib", "val_bits_per_byte"}
LAYERS = {"dt_median/0", "decay_least/1", "ssm_rms/0", "kv_rms/1"}


@pytest.fixture
def fit(stack_file: Path, corpus: Path, tmp_path: Path) -> Callable[..., None]:
    def told(*words: str) -> None:
        given = ["--preset", str(stack_file), "--data.path", str(corpus), "--data.seq_len", "32"]
        given += ["--data.batch_size", "4", "--data.cache_dir", str(tmp_path), "--trainer.max_steps", "6"]
        given += ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1", "--diagnose_every", "3"]
        given += ["--peak_flops", "1e9", "--trainer.default_root_dir", str(tmp_path / "run")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run("fit", [*given, *words, "--trainer.enable_progress_bar", "false"])

    return told


def test_tensorboard(fit: Callable[..., None], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    fit("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(tmp_path / "board"))
    (file,) = (tmp_path / "board").rglob("events.out.*")
    found = EventAccumulator(str(file)).Reload()
    tags = set(found.Tags()["scalars"])
    assert tags >= TOLD | LAYERS, (TOLD | LAYERS) - tags
    assert [event.step for event in found.Scalars("loss")] == list(range(6))
    assert [event.step for event in found.Scalars("dt_median/0")] == [2, 5]


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases(fit: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the file that it would send. `pip install wandb` first."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit(
        "--trainer.logger",
        "WandbLogger",
        "--trainer.logger.save_dir",
        str(tmp_path),
        "--trainer.logger.offline",
        "true",
    )
    wandb.finish()
    (file,) = tmp_path.rglob("*.wandb")
    sent = file.read_bytes()  # records that name what they hold
    assert not [name for name in TOLD | LAYERS if name.encode() not in sent]
