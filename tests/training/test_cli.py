"""The command line as a user types it: fit, kill, resume, test, generate."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eulerstack as es

from ..conftest import PATIENCE

RUN = [sys.executable, "-m", "eulerstack"]
DRAWING = ("optimizer=hybrid", "dropout=0.2", "checkpointing=block")
"""A recipe whose steps draw, and whose optimizer is two."""


def eulerstack(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *words], cwd=cwd, capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cwd)}
    )


def fit_words(stack_file: Path, corpus: Path, root: str, steps: int = 30) -> list[str]:
    return [
        *(
            "fit",
            "--preset",
            str(stack_file),
            "--data.path",
            str(corpus),
            "--data.seq_len",
            "32",
            "--data.batch_size",
            "4",
        ),
        *("--trainer.max_steps", str(steps), "--resume_every", "3", "--trainer.default_root_dir", root),
    ]


def weights(root: Path) -> bytes:
    return (root / "checkpoint" / "model.safetensors").read_bytes()


def test_fit_test_and_generate(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    done = eulerstack(*fit_words(stack_file, corpus, "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").is_file()
    assert "checkpoint: run/checkpoint" in done.stdout + done.stderr
    for word in ("loss", "bits_per_byte", "tokens_per_second"):
        assert word in done.stdout + done.stderr

    done = eulerstack(
        "test", "--checkpoint", "run/checkpoint", "--data.path", str(corpus), "--data.seq_len", "32", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "held-out bits per byte: " in done.stdout
    assert "unigram entropy of the same text: " in done.stdout
    assert "gzip -9 of the same text: " in done.stdout

    one = ["generate", "--checkpoint", "run/checkpoint", "--prompt", "doc", "--max-new-tokens", "20", "--seed", "1"]
    done = eulerstack(*one, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("doc")
    assert done.stdout == eulerstack(*one, cwd=tmp_path).stdout
    cut = done.stdout[3:15]
    assert eulerstack(*one, "--stop", cut, cwd=tmp_path).stdout == f"doc{done.stdout[3:].partition(cut)[0]}\n"
    assert len(eulerstack(*one, "--logprobs", "2", cwd=tmp_path).stdout.splitlines()) == 20
    done = eulerstack(*one, "--prompt", "a longer one", "--temperature", "0", cwd=tmp_path)
    assert "--- 2 of 2\na longer one" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_and_resumed_is_never_killed_to_the_bit(
    seed: int, stack_file: Path, corpus: Path, tmp_path: Path
) -> None:
    more = ["--data.workers", "2"] if seed % 2 else []
    more += [f"--model.{word}" for word in DRAWING] if seed % 3 == 2 else []
    steps = 200  # two epochs and a bit
    straight = eulerstack(
        *fit_words(stack_file, corpus, "straight", steps), *more, "--trainer.max_epochs", "-1", cwd=tmp_path
    )
    assert straight.returncode == 0, straight.stderr
    words = [*fit_words(stack_file, corpus, "killed", steps), *more]
    running = subprocess.Popen(
        [*RUN, *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    last = tmp_path / "killed" / "resume" / "last.ckpt"
    deadline = time.monotonic() + PATIENCE
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 2))
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (tmp_path / "killed" / "checkpoint").exists()
    resumed = eulerstack(*words, "--ckpt_path", "last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


@pytest.mark.slow
def test_options_of_lightning_that_switch_our_parts_off(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    words = [*fit_words(stack_file, corpus, "run", 2), "--trainer.enable_progress_bar", "false"]
    done = eulerstack(*words, "--trainer.enable_checkpointing", "false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "resume").exists()
    config = next((tmp_path / "run" / "logs").glob("*/config.yaml"))
    done = eulerstack("fit", f"--config={config}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = weights(tmp_path / "run")
    done = eulerstack(*fit_words(stack_file, corpus, "run", 2), "--trainer.fast_dev_run", "true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == before


def test_settings_reach_the_trained_stack(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    words = [*fit_words(stack_file, corpus, "run", 2), "--set", "model.mlp_ratio=3", "--set=training_hints.seed=5"]
    done = eulerstack(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    spec = es.load(tmp_path / "run" / "checkpoint")
    assert spec == es.load(stack_file, ["model.mlp_ratio=3", "training_hints.seed=5"])
    config = next((tmp_path / "run" / "logs").glob("*/config.yaml")).read_text()
    assert "model.mlp_ratio=3" in config and "seed_everything: 5" not in config
    done = eulerstack("fit", "--preset", str(stack_file), "--set", "model.mlp_rati=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "Setting: --set model.mlp_rati: there is no key" in done.stderr


def test_another_stack_does_not_resume(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    assert eulerstack(*fit_words(stack_file, corpus, "run", 4), cwd=tmp_path).returncode == 0
    stack_file.write_text(
        stack_file.read_text().replace(
            "chunk_size: 16}}, ffn: {type: gated_mlp}}\n  a", "chunk_size: 8}}, ffn: {type: gated_mlp}}\n  a"
        )
    )
    done = eulerstack(*fit_words(stack_file, corpus, "run", 8), "--ckpt_path", "last", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "with another stack" in done.stderr
    assert "retnet.chunk_size was 16 and is 8" in done.stderr or "mamba.chunk_size was 16 and is 8" in done.stderr
    assert "Traceback" not in done.stderr


BAD = {
    "no stack": (["fit"], ""),
    "no run to resume": (["fit", "--preset", "{file}", "--data.path", "{corpus}", "--ckpt_path", "last"], "there is no"),
    "no such point": (["fit", "--preset", "{file}", "--data.path", "{corpus}", "--ckpt_path", "x.ckpt"], "x.ckpt"),
    "split without fsdp2": (["fit", "--preset", "{file}", "--tensor_parallel", "2"], "--trainer.strategy fsdp2"),
    "devices left over": (
        ["fit", "--preset", "{file}", "--trainer.strategy", "fsdp2", "--tensor_parallel", "2", "--trainer.devices", "1"],
        "tensor_parallel = 2 does not divide the 1 devices of the run",
    ),
    "untrained": (["test", "--checkpoint", "{file}", "--data.path", "{corpus}"], "freshly drawn weights"),
    "recipe out of range": (["fit", "--preset", "{file}", "--model.warmup_steps_ratio", "7"], "warmup_steps_ratio"),
    "unknown key": (["fit", "--preset", "{file}", "--data.seq_length", "3"], "seq_length"),
    "bad value": (["fit", "--preset", "{file}", "--data.seq_len", "many"], "seq_len"),
    "bad range": (["fit", "--preset", "{file}", "--data.batch_size", "0"], "data.batch_size = 0"),
    "no text": (["fit", "--preset", "{file}", "--data.path", "/nowhere"], "/nowhere"),
    "too long": (["fit", "--preset", "{file}", "--data.path", "{corpus}", "--data.seq_len", "1025"], "max_seq_len = 1024"),
    "no checkpoint to test": (["test", "--checkpoint", "nothing"], "nothing"),
    "no checkpoint": (["generate", "--checkpoint", "nothing", "--prompt", "x"], "is no checkpoint"),
    "no provider": (["fit", "--preset", "{file}", "--data.path", "{corpus}", "--model.kernels", "fla"], "kernels='fla'"),
    "no verb": (["train"], "No such command 'train'"),
    "no preset": (["presets", "show", "x"], "there is no preset 'x'"),
    "no file": (["validate"], "give one FILE"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if i % 3 == 0 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(BAD)]
)
def test_bad_words_exit_2_with_a_sentence(name: str, stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    words, wanted = BAD[name]
    done = eulerstack(*[w.format(file=stack_file, corpus=corpus) for w in words], cwd=tmp_path)
    if name == "no stack":
        assert "eulerstack fit --preset" in done.stdout
        return
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
