"""`eulerstack fit` and `eulerstack test`: Lightning's own command line over StackModule and TextData."""

import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from ..disk import recover
from ..paths import expand_home
from ..spec import hint_places, load
from .background import InBackground
from .callbacks import Export
from .data import TextData
from .diagnostics import Diagnostics
from .keeping import LAST, KeepBest, WholeFiles
from .module import StackModule
from .preemption import Preempted, Preemption, signals_put_back
from .profiling import Profile
from .settings import table
from .strategy import FSDP2, forget
from .throughput import Throughput

DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # `eulerstack explain` draws it
}
BAR_EVERY = 5
TOLD = {"callbacks", "profilers", "tuner"}
"""Folders of Lightning whose words at level INFO reach the terminal."""


class StackCLI(LightningCLI):
    """What a run leaves goes where `--trainer.default_root_dir` says: runs/NAME unless given.

    resume/last.ckpt is for `--ckpt_path last`, checkpoint/ and best/ for `test` and `generate`, logs/ and loss.png to
    look at.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--resume_every", type=int, default=50, help="Steps between writes of resume/last.ckpt.")
        parser.add_argument(
            "--diagnose_every", type=int, default=100, help="Steps between logs of decays and states by layer; 0: none."
        )
        text = "Write resume/last.ckpt beside the training: its steps wait for a copy in memory alone."
        parser.add_argument("--async_save", type=bool, default=False, help=text)
        text = "Devices that split each layer between them; the other devices share batches. Needs strategy fsdp2."
        parser.add_argument("--tensor_parallel", type=int, default=1, help=text)
        text = "How many checkpoints to keep in best/: those with the lowest val_bits_per_byte."
        parser.add_argument("--keep_best", type=int | None, default=None, help=text)
        text = "Write a trace of five steps, and a table of what each kind of layer takes, into profile/."
        parser.add_argument("--profile", action="store_true", help=text)
        text = "The device's FLOPs a second, for MFU; that of the data sheet for GPUs that are known."
        parser.add_argument("--peak_flops", type=float | None, default=None, help=text)

    def _parse_ckpt_path(self) -> None:
        """Lightning reads the module's hyperparameters from the file here; a StackModule saves none."""

    def before_instantiate_classes(self) -> None:
        """Give `~` its meaning in every path; seed."""
        for key in ("trainer", "ckpt_path"):  # Lightning's own: its loggers and profilers make a folder called `~`
            part = self.config[self.subcommand]
            part[key] = _expand_homes(part.get(key))
        self.seed()

    def seed(self) -> None:
        """By --seed_everything, or by the spec's hint."""
        if self._get(self.config, "seed_everything") is False:
            model = self._get(self.config, "model")
            spec = load(model["spec"], model["settings"] or ())
            L.seed_everything(spec.training_hints.seed, workers=True)

    def before_fit(self) -> None:
        """Print what the run trains with."""
        assert isinstance(self.model, StackModule)
        options = {"seed": self._get(self.config, "seed_everything"), "grad_clip": self.trainer.gradient_clip_val}
        given = {key: value for key, value in options.items() if value is not None and value is not False}
        places = hint_places(self._get(self.config, "model")["spec"])
        if self.trainer.is_global_zero:
            print(table(self.model.spec, places, self.model.changes, given))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        root = expand_home(config["default_root_dir"] or f"runs/{self.model.spec.model.name}")
        kwargs["default_root_dir"] = str(root)
        if config["max_epochs"] is None and config["max_steps"] == -1 and config["max_time"] is None:
            kwargs["max_epochs"] = 1
        fitting = self.subcommand == "fit"
        callbacks: list[L.Callback] = []
        if config["enable_progress_bar"] is not False:
            callbacks.append(TQDMProgressBar(BAR_EVERY))
        keeping = fitting and config["enable_checkpointing"] is not False
        if keeping:
            callbacks.append(self._resume_point(root))
        if fitting:
            callbacks += [Export(), *self._watchers(root), Preemption(root / LAST if keeping else None)]
        disk = InBackground() if self._get(self.config, "async_save") else WholeFiles()
        kwargs["plugins"] = _with_checkpoints(config["plugins"], disk)
        if config["logger"] in (None, True):
            kwargs["logger"] = CSVLogger(root, name="logs") if fitting else False
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        kwargs["strategy"] = self._strategy(config["strategy"])
        return super().instantiate_trainer(**kwargs)

    def _strategy(self, wanted: Any) -> Any:
        """The Trainer's; fsdp2 with the options that are its own."""
        tensor = self._get(self.config, "tensor_parallel")
        if wanted == "fsdp2":
            return FSDP2(tensor, self._get(self.config, "async_save"))
        if tensor != 1:
            raise ValueError(f"--tensor_parallel {tensor} needs --trainer.strategy fsdp2")
        return wanted

    def _watchers(self, root: Path) -> list[L.Callback]:
        """What keeps the best stacks, tells of the mixers and records a profile, if they are asked for; the clock."""
        best, every, peak = (self._get(self.config, key) for key in ("keep_best", "diagnose_every", "peak_flops"))
        told: list[L.Callback] = [] if every == 0 else [Diagnostics(every)]
        told += [Profile(root / "profile")] if self._get(self.config, "profile") else []
        return [*([] if best is None else [KeepBest(best)]), *told, Throughput(peak)]

    def _resume_point(self, root: Path) -> ModelCheckpoint:
        """resume/last.ckpt; one of an earlier run goes, unless this run resumes it."""
        last, wanted = root / LAST, self._get(self.config, "ckpt_path")
        recover(last)
        if wanted is None:
            forget(last)
        if wanted == "last" and not last.exists():
            raise ValueError(f"--ckpt_path last: there is no {last} to go on from; start without --ckpt_path")
        every = self._get(self.config, "resume_every")
        if every < 1:
            raise ValueError(f"--resume_every {every} must be 1 or more")
        return ModelCheckpoint(last.parent, last.stem, every_n_train_steps=every, enable_version_counter=False)


def _expand_homes(value: Any) -> Any:
    """A part of a config, every text in it that begins with `~` being a path."""
    if isinstance(value, str):
        return str(expand_home(value)) if value.startswith("~") else value
    if isinstance(value, list):
        return [_expand_homes(item) for item in value]
    if isinstance(value, dict):
        return {key: _expand_homes(item) for key, item in value.items()}
    return Namespace(**_expand_homes(vars(value))) if isinstance(value, Namespace) else value


def _with_checkpoints(plugins: Any, disk: WholeFiles) -> list[Any]:
    """The Trainer's plugins, and ours for checkpoints. Raises ValueError for two that write them."""
    given = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
    others = [plugin for plugin in given if isinstance(plugin, CheckpointIO)]
    if others and isinstance(disk, InBackground):
        raise ValueError(
            f"--async_save writes checkpoints, and so does {type(others[0]).__name__}; leave one of them out"
        )
    return given if others else [*given, disk]


def run(verb: str, arguments: list[str]) -> None:
    """One verb of the command line; raises ValueError for what cannot be trained or measured.

    Raises SystemExit for a run that was told to stop.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(asked_for)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # that its collectives could be fewer
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec.*deprecated.*")
    warnings.filterwarnings("ignore", message=".*grad attribute of a Tensor that is not a leaf.*")  # torch.compile's
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    try:
        with signals_put_back():
            cli = StackCLI(
                StackModule,
                TextData,
                args=[verb, *arguments],
                seed_everything_default=False,
                trainer_defaults=DEFAULTS,
                save_config_kwargs={"overwrite": True},
                auto_configure_optimizers=False,
            )
    except (MisconfigurationException, OSError) as error:
        raise ValueError(str(error)) from error
    except Preempted as stopped:
        _leave(stopped)
    except (KeyboardInterrupt, SystemExit) as ended:
        if not isinstance(ended, KeyboardInterrupt) and not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        _tell("stopped by SIGINT outside the training: nothing new was kept")
        raise SystemExit(128 + signal.SIGINT) from None
    if verb == "test":
        _report(cli.trainer, cli.datamodule)


def asked_for(record: logging.LogRecord) -> bool:
    """Whether a record of Lightning's is a warning, or from a part that a user added: callbacks, profilers, the tuner.

    Its tips, and its tables of hardware, are not.
    """
    return record.levelno >= logging.WARNING or Path(record.pathname).parent.name in TOLD


@rank_zero_only
def _tell(sentence: object) -> None:
    print(sentence, file=sys.stderr)


def _leave(stopped: Preempted) -> NoReturn:
    """Ends the process; its job is queued again if that was asked for."""
    _tell(stopped)
    if stopped.job is not None:
        _tell(stopped.requeue())
    raise SystemExit(stopped.exit_code)


def _report(trainer: L.Trainer, data: TextData) -> None:
    bits = float(trainer.callback_metrics["held_out_bits_per_byte"])
    print(f"held-out bits per byte: {bits:.3f}")
    for name, value in data.yardsticks.items():
        print(f"  {name} of the same text: {value:.3f}")
