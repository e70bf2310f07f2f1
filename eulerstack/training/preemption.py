"""A run that is told to go: it ends the step it is at, keeps its state, and says so by its exit code.

Lightning's own answers are not used. On SIGTERM it ends with exit code 0, which tells a scheduler that the training is
done; on SLURM's signal it writes a checkpoint inside the signal handler, in the middle of a step.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import distributed as dist

TOLD_BY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AT_ONCE = b"stopped at once by a second SIGINT: what is kept is what was kept before\n"


class Preempted(Exception):  # noqa: N818 - no error: the run did what it was told
    """The run has ended before its last step. job: the SLURM job to queue again, if there is one.

    exit_code: 128 and the signal's number, as a shell has it: 143 for SIGTERM, 138 for SIGUSR1, 130 for SIGINT.
    """

    def __init__(self, told_by: int, step: int, kept: bool, job: str | None) -> None:
        then = "go on with --ckpt_path last" if kept else "nothing was kept, for checkpoints are switched off"
        super().__init__(f"stopped by {signal.Signals(told_by).name} after step {step}: {then}")
        self.exit_code, self.job = 128 + told_by, job

    def requeue(self) -> str:
        """`scontrol requeue`, and how it went. Called when all is on the disk, for SLURM kills the job at once."""
        try:
            done = subprocess.run(["scontrol", "requeue", str(self.job)], capture_output=True, text=True, check=False)
        except OSError as error:
            return f"SLURM job {self.job} is not requeued: scontrol cannot be run ({error.strerror})"
        if done.returncode:
            return f"SLURM job {self.job} is not requeued: scontrol said {done.stderr.strip() or done.returncode}"
        return f"SLURM job {self.job} is requeued"


class Preemption(L.Callback):
    """On SIGTERM, SIGUSR1 or SIGINT, write `last`, if there is one, after the optimizer step, and raise Preempted.

    Of several processes all stop after the same step, whichever of them was told. On SLURM, SIGUSR1 also asks for the
    job to be queued again; SIGTERM does not, for it is also what `scancel` sends. A second SIGINT (Ctrl-C) ends the
    process at once, with exit code 130. When the run has ended, signals do what they did before it.
    """

    def __init__(self, last: Path | None) -> None:
        self.last = last
        self.told_by = 0
        self._step = 0
        self._group: Any = None
        self._before: dict[int, Any] = {}
        self._runs = False
        self._process = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before Lightning, which leaves SIGUSR1 alone where it has a handler."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After Lightning, whose handler of SIGTERM goes."""
        self._listen()
        self._step = trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._runs, self._process = True, os.getpid()
        for number in TOLD_BY:
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:
            return  # a process that loads batches, which ends with this one
        if not self._runs:  # Lightning has put this handler back, as it found it, when its own went
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
            return
        if number == self.told_by == signal.SIGINT:
            os.write(2, AT_ONCE)
            os._exit(128 + number)  # a step, or a writing, may last; what is half written has no name yet
        self.told_by = number

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._put_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._put_back()

    def _put_back(self) -> None:
        self._runs = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # the gradients of accumulated batches are in no checkpoint
        self._step = trainer.global_step
        told_by = self._told()
        if told_by and trainer.global_step != trainer.max_steps:
            if self.last is not None:
                trainer.save_checkpoint(self.last)
            raise Preempted(told_by, trainer.global_step, self.last is not None, _job(trainer, told_by))

    def _told(self) -> int:
        """The signal, also if another process had it."""
        if self._group is None:
            return self.told_by
        highest = torch.tensor(self.told_by)
        dist.all_reduce(highest, dist.ReduceOp.MAX, self._group)
        return int(highest)


def _job(trainer: L.Trainer, told_by: int) -> str | None:
    """The SLURM job to queue again, by the first process; None where nobody asked."""
    environment = trainer._accelerator_connector.cluster_environment
    asked = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    if not asked or told_by != signal.SIGUSR1 or not trainer.is_global_zero:
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


@contextmanager
def signals_put_back() -> Iterator[None]:
    """What this process does on the signals is afterwards what it was before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in TOLD_BY}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
