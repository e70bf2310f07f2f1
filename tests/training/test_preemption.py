"""A run that is told to go: what it leaves, its exit code, and SLURM's queue."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import eulerstack as es
from eulerstack.cli.train import run
from eulerstack.training import preemption
from eulerstack.training.preemption import Preempted, Preemption

from ..conftest import PATIENCE
from .test_cli import RUN, eulerstack, fit_words, weights

STEPS = 400
SLURM = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"},
}


def told(number: int, words: list[str], cwd: Path, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a run that gets the signal after its first checkpoint, which it writes at step 3."""
    told = {**os.environ, "XDG_CACHE_HOME": str(cwd), **environment}
    running = subprocess.Popen(
        [*RUN, *words], cwd=cwd, env=told, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    last, deadline = cwd / "told" / "resume" / "last.ckpt", time.monotonic() + PATIENCE
    while not last.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(number)
    _, said = running.communicate(timeout=PATIENCE)
    return running.returncode, said


@pytest.mark.slow
def test_terminated_and_resumed_is_never_stopped_to_the_bit(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    more = ["--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "-1", "--model.dropout", "0.1"]
    straight = eulerstack(*fit_words(stack_file, corpus, "straight", STEPS), *more, cwd=tmp_path)
    assert straight.returncode == 0, straight.stderr
    words = [*fit_words(stack_file, corpus, "told", STEPS), *more]
    code, said = told(signal.SIGTERM, words, tmp_path)
    assert code == 143, said
    assert not (tmp_path / "told" / "checkpoint").exists()
    resumed = eulerstack(*words, "--ckpt_path", "last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert weights(tmp_path / "told") == weights(tmp_path / "straight")


def test_terminated_is_no_success(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    """Lightning itself would exit with 0. The state is that after the step it was at, not the last of every third."""
    words = [*fit_words(stack_file, corpus, "told", STEPS), "--trainer.accumulate_grad_batches", "3"]
    code, said = told(signal.SIGTERM, [*words, "--trainer.max_epochs", "-1"], tmp_path)
    assert code == 143, said
    found = re.search(r"stopped by SIGTERM after step (\d+): go on with --ckpt_path last", said)
    assert found is not None, said
    kept = torch.load(tmp_path / "told" / "resume" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == int(found[1]) > 0
    assert kept["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 3 * int(found[1])


@pytest.mark.slow
def test_slurm_is_asked_to_queue_the_job_again(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    """By the signal that comes before the time is up; once the state is on the disk."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nls {tmp_path}/told/resume > {tmp_path}/there\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    words = fit_words(stack_file, corpus, "told", STEPS)
    code, said = told(signal.SIGUSR1, words, tmp_path, PATH=path, **SLURM)
    assert code == 138, said
    assert "stopped by SIGUSR1" in said and "SLURM job 77 is requeued" in said
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert (tmp_path / "there").read_text() == "last.ckpt\n"
    assert not list((tmp_path / "told").glob("hpc_ckpt*"))  # Lightning's, of the middle of a step


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_of_two_processes_both_stop_after_the_same_step(
    strategy: str, stack_file: Path, corpus: Path, tmp_path: Path
) -> None:
    """Though one of them was told. What they leave goes on to the end."""
    words = [*fit_words(stack_file, corpus, "told", 60), "--trainer.accelerator", "cpu", "--trainer.max_epochs", "-1"]
    words += ["--trainer.devices", "2", "--trainer.strategy", strategy]
    code, said = told(signal.SIGTERM, words, tmp_path)
    assert code == 143, said
    assert said.count("stopped by SIGTERM after step") == 1
    done = eulerstack(*words, "--ckpt_path", "last", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "told" / "checkpoint").exists()


def test_a_queue_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stopped = Preempted(signal.SIGUSR1, 5, True, "77_3")
    assert stopped.requeue() == "SLURM job 77_3 is not requeued: scontrol cannot be run (No such file or directory)"
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 3\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert stopped.requeue() == "SLURM job 77_3 is not requeued: scontrol said no such job"
    assert "nothing was kept" in str(Preempted(signal.SIGTERM, 5, False, None))


def told_in_this_process(number: int, words: list[str], monkeypatch: pytest.MonkeyPatch, times: int = 1) -> int:
    """Exit code of a run that gets the signal in its fifth step."""
    begun = es.StackModule.on_train_batch_start

    def tell(self: es.StackModule, batch: object, index: int) -> None:
        begun(self, batch, index)  # type: ignore[arg-type]
        for _ in range(times if index == 4 else 0):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(es.StackModule, "on_train_batch_start", tell)
    monkeypatch.setattr("sys.argv", ["eulerstack"])
    with pytest.raises(SystemExit) as ended:
        run("fit", [*words[1:], "--model.kernels", "torch", "--trainer.enable_progress_bar", "false"])
    return int(str(ended.value.code))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_is_as_sigterm(
    number: int,
    code: int,
    stack_file: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = signal.getsignal(number)
    words = fit_words(stack_file, corpus, str(tmp_path / "told"), STEPS)
    assert told_in_this_process(number, words, monkeypatch) == code
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name} after step 5: go on with --ckpt_path last" in said
    assert torch.load(tmp_path / "told" / "resume" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert signal.getsignal(number) == before


@pytest.mark.filterwarnings("ignore")
def test_a_second_ctrl_c_ends_at_once(
    stack_file: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the step; what was kept before stays."""

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(preemption.os, "_exit", end)
    words = fit_words(stack_file, corpus, str(tmp_path / "told"), STEPS)
    assert told_in_this_process(signal.SIGINT, words, monkeypatch, times=2) == 130
    assert "stopped at once by a second SIGINT" in capfd.readouterr().err
    assert torch.load(tmp_path / "told" / "resume" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_before_the_training(
    stack_file: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(self: es.TextData) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(es.TextData, "prepare_data", pressed)
    assert told_in_this_process(signal.SIGINT, fit_words(stack_file, corpus, str(tmp_path)), monkeypatch) == 130
    assert "stopped by SIGINT outside the training: nothing new was kept" in capsys.readouterr().err


def test_after_the_run_signals_do_what_they_did() -> None:
    """Also where Lightning, which found this handler, has put it back."""
    watching, heard = Preemption(None), []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    watching._listen()
    ours = signal.getsignal(signal.SIGUSR1)
    watching._put_back()
    signal.signal(signal.SIGUSR1, ours)
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] and watching.told_by == 0
