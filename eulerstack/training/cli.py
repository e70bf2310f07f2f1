"""`eulerstack fit` and `eulerstack test`: Lightning's own command line over StackModule and TextData."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from .callbacks import Export
from .data import TextData
from .module import StackModule

DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": 1,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # `eulerstack explain` draws it
}
BAR_EVERY = 5


class StackCLI(LightningCLI):
    """What a run leaves goes where `--trainer.default_root_dir` says: runs/NAME unless given.

    resume/last.ckpt is for `--ckpt_path last`, checkpoint/ for `test` and `generate`, logs/ and loss.png to look at.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--resume_every", type=int, default=100, help="Steps between writes of resume/last.ckpt.")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        root = Path(config["default_root_dir"] or f"runs/{self.model.spec.model.name}")
        kwargs["default_root_dir"] = str(root)
        callbacks: list[L.Callback] = [TQDMProgressBar(BAR_EVERY)]
        if self.subcommand == "fit":
            every = self._get(self.config, "resume_every")
            resume = ModelCheckpoint(root / "resume", "last", every_n_train_steps=every, enable_version_counter=False)
            callbacks += [resume, Export()]
        if config["logger"] in (None, True):
            kwargs["logger"] = CSVLogger(root, name="logs") if self.subcommand == "fit" else False
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        return super().instantiate_trainer(**kwargs)


def run(verb: str, arguments: list[str], seed: int) -> None:
    """One verb of the command line; raises ValueError for what cannot be trained or measured."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # tips and hardware tables; warnings still come
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec.*deprecated.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    cli = StackCLI(
        StackModule,
        TextData,
        args=[verb, *arguments],
        seed_everything_default=seed,
        trainer_defaults=DEFAULTS,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
    )
    if verb == "test":
        _report(cli.trainer, cli.datamodule)


def _report(trainer: L.Trainer, data: TextData) -> None:
    bits = float(trainer.callback_metrics["held_out_bits_per_byte"])
    print(f"held-out bits per byte: {bits:.3f}")
    for name, value in data.shards["held_out"].yardsticks.items():
        print(f"  {name} of the same text: {value:.3f}")
