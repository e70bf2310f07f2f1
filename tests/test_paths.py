"""`~` is the home folder in every path that a user writes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import eulerstack as es
from eulerstack.cli.main import cli
from eulerstack.paths import expand_home
from eulerstack.training.keeping import WholeFiles

TEXT = "the text number {} of four\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a stack, its checkpoint and texts; the current folder is another, and stays empty."""
    for name in ("home/texts", "here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path / "here")
    builder = es.StackBuilder(d_model=16, n_heads=2, max_seq_len=64).add("attention")
    es.dump(builder.spec(), tmp_path / "home" / "stack.yml")
    es.save_checkpoint(builder.build(), tmp_path / "home" / "checkpoint")
    for number in range(4):
        (tmp_path / "home" / "texts" / f"{number}.txt").write_text(TEXT.format(number) * 20)
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def _nothing_here(home: Path) -> Any:
    yield
    assert os.listdir() == []


def test_what_stands_for_a_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [expand_home(path) for path in ("~", "~/a/b", Path("~/a"))] == [home, home / "a/b", home / "a"]
    for same in ("a~", "a/~", "~nobody-of-that-name/a"):
        assert expand_home(same) == Path(same)
    assert expand_home(expand_home("./~/a")) == Path.cwd() / "~" / "a"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", dict[int, Any]().__getitem__)  # as in a container whose user has no name
    with pytest.raises(ValueError, match="HOME is not set here; write the whole path"):
        expand_home("~/a")


def test_in_python(home: Path) -> None:
    spec = es.load("~/stack.yml")
    assert es.dump(spec, "~/copy.yml") == (home / "copy.yml").read_text()
    model = es.load_checkpoint("~/checkpoint")
    es.save_checkpoint(model, "~/made/copy")
    assert (home / "made/copy/spec.yml").is_file()
    state = model.chunkwise(torch.tensor([[1, 2]]), model.init_state(1, 8))[1]
    state.save("~/made/state", model)
    assert es.StackState.load("~/made/state", model).length.tolist() == [2]
    es.Sessions("~/made/talks", model).park("a", state, [1, 2])
    assert (home / "made/talks/a.safetensors").is_file()
    WholeFiles().save_checkpoint({"step": 3}, "~/made/a.ckpt")
    assert WholeFiles().load_checkpoint("~/made/a.ckpt") == {"step": 3}
    assert es.StackModule("~/stack.yml").weights is None
    assert es.StackModule("~/checkpoint").weights == home / "checkpoint"
    data = es.TextData("~/texts", cache_dir="~/cache", seq_len=16)
    data.setup()
    assert list((home / "cache").iterdir()) and data.sources[0].path == str(home / "texts")
    for path, wanted in (("local:~/rows", f"local:{home}/rows"), ("s3://bucket/~/rows", "s3://bucket/~/rows")):
        assert es.TextData(path).sources[0].path == wanted
    es.TextData(sources=[{"path": "~/texts", "weight": 1}], seq_len=16).setup()
    assert (home / ".cache/eulerstack").is_dir()


@pytest.mark.parametrize("written", ["~/words/tokenizer.json", "~/words"])
def test_a_tokenizer(written: str, home: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    (home / "words").mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "?": 1}, "?")).save(str(home / "words/tokenizer.json"))
    contract = {"type": "hf", "pretrained": written, "add_bos": False, "add_eos": False}
    spec = es.StackBuilder(16, 2).set(tokenizer_contract=contract).add("attention").spec()
    assert es.tokenizer_of(spec.tokenizer_contract).vocab_size == 2
    assert es.tokenizer_of(spec.tokenizer_contract, "~/words").vocab_size == 2


def test_on_the_command_line(home: Path) -> None:
    def run(*words: str) -> Result:
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, done.output
        return done

    for verb in ("validate", "explain", "compile", "estimate"):
        assert run(verb, "~/stack.yml").output == run(verb, "--preset=~/stack.yml").output
    run("diff", "~/stack.yml", "~/checkpoint")
    run("estimate", "~/stack.yml", "--match", "parameters=~/stack.yml")
    run("explain", "~/stack.yml", "--picture=~/stack.svg")
    run("compile", "~/stack.yml", "--output=~/stack.json")
    run("checkpoint", "inspect", "~/checkpoint")
    run("checkpoint", "convert", "~/checkpoint", "~/checkpoint16", "--dtype", "bfloat16")
    run("generate", "--checkpoint=~/checkpoint16", "--prompt", "a", "--max-new-tokens", "2", "--draft=~/checkpoint")
    assert {"stack.svg", "stack.json", "checkpoint16"} <= set(os.listdir(home))


RUN = """
model: {spec: ~/stack.yml}
data: {path: ~/texts, cache_dir: ~/tokens, seq_len: 16}
trainer:
  max_steps: STEPS
  accelerator: cpu
  default_root_dir: ~/runs/a
  enable_progress_bar: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: ~/logs}}
  profiler: {class_path: lightning.pytorch.profilers.SimpleProfiler, init_args: {dirpath: ~/profiles, filename: p}}
"""


def test_in_a_run_and_its_resumption(home: Path) -> None:
    """By the command line in a process of its own, where Lightning's loggers and profilers get paths too."""

    def fit(steps: int, *more: str) -> "subprocess.CompletedProcess[str]":
        (home / "run.yaml").write_text(RUN.replace("STEPS", str(steps)))
        words = [sys.executable, "-m", "eulerstack", "fit", "--config=~/run.yaml", *more]
        return subprocess.run(words, capture_output=True, text=True)

    done = fit(2)
    assert done.returncode == 0, done.stderr
    for place in ("runs/a/resume/last.ckpt", "runs/a/checkpoint", "tokens", "logs/lightning_logs", "profiles"):
        assert (home / place).exists(), place
    done = fit(4, "--ckpt_path=last")
    assert done.returncode == 0, done.stderr
    assert WholeFiles().load_checkpoint("~/runs/a/resume/last.ckpt")["global_step"] == 4
