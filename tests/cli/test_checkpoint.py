"""checkpoint inspect and convert."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

import eulerstack as es

Run = Callable[..., Result]


@pytest.fixture
def model() -> es.Stack:
    return es.build(es.load("every_mixer_mini"))


@pytest.fixture
def saved(model: es.Stack, tmp_path: Path) -> Path:
    es.save_checkpoint(model, tmp_path / "saved", notes={"step": 7})
    return tmp_path / "saved"


@pytest.fixture
def stopped(model: es.Stack, tmp_path: Path) -> Path:
    """A run's .ckpt, as Lightning names weights."""
    file = tmp_path / "run" / "resume" / "last.ckpt"
    file.parent.mkdir(parents=True)
    weights = {f"_built.{name}": weight for name, weight in model.state_dict().items()}
    torch.save({"state_dict": weights, "stack": es.dump(model.spec), "optimizer_states": []}, file)
    return file


def test_what_a_checkpoint_holds(eulerstack: Run, model: es.Stack, saved: Path) -> None:
    found = json.loads(eulerstack("checkpoint", "inspect", str(saved), "--json").output)
    assert found["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert found["bytes"] == sum(w.numel() * w.element_size() for w in model.state_dict().values())
    assert found["bytes"] == sum(room["bytes"] for room in found["rooms"].values())
    assert (found["name"], found["format"], found["tokenizer"], found["step"]) == (model.spec.model.name, 1, "bytes", 7)
    assert {"mixers: mamba2", "mixers: rwkv", "FFNs: moe", "embedding", "norm", "norms of layers"} <= set(
        found["rooms"]
    )
    assert found["rooms"]["embedding"]["parameters"] == model.embedding.weight.numel()
    text = eulerstack("checkpoint", "inspect", str(saved)).output
    assert f"{found['parameters']:,}" in text and "F32" in text and "tokenizer: bytes" in text


def test_inspect_loads_no_torch(saved: Path) -> None:
    code = "import sys; from eulerstack.cli.main import cli\n"
    code += f"cli(['checkpoint', 'inspect', {str(saved)!r}], standalone_mode=False)\n"
    code += "assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=saved.parent)


def test_a_stopped_run_becomes_a_checkpoint(eulerstack: Run, model: es.Stack, stopped: Path, tmp_path: Path) -> None:
    done = eulerstack("checkpoint", "convert", str(stopped), str(tmp_path / "made"))
    assert done.exit_code == 0, done.output
    made = es.load_checkpoint(tmp_path / "made")
    assert made.spec == model.spec
    assert all(map(torch.equal, made.state_dict().values(), model.state_dict().values()))


def test_what_stays_float32_does(eulerstack: Run, saved: Path, stopped: Path, tmp_path: Path) -> None:
    found = []
    for source in (saved, stopped):
        target = tmp_path / f"half of {source.name}"
        done = eulerstack("checkpoint", "convert", str(source), str(target), "--dtype", "bfloat16")
        assert done.exit_code == 0, done.output
        assert es.load(target).model.dtype == "bfloat16"
        found.append(load_file(target / "model.safetensors"))
        assert es.load_checkpoint(target).embedding.weight.dtype == torch.bfloat16
    before = load_file(saved / "model.safetensors")
    for name, weight in found[0].items():
        island = name.endswith(("A_log", ".D", "dt_bias", "time.decay", "time.bonus", "correction.bias", "sinks"))
        assert torch.equal(weight, found[1][name])
        if island:
            assert torch.equal(weight, before[name]), name
        elif name.endswith("proj.weight"):
            assert weight.dtype == torch.bfloat16, name


BAD = {
    "no folder": (["inspect", "nowhere"], "nowhere is no checkpoint"),
    "a run": (["inspect", "run"], "give run/checkpoint"),
    "a state": (["inspect", "junk.ckpt"], "make one by `eulerstack checkpoint convert junk.ckpt DIR`"),
    "cut short": (["inspect", "cut"], "model.safetensors is damaged: it is cut short"),
    "nothing": (["convert", "nowhere", "out"], "there is no nowhere"),
    "junk": (["convert", "junk.ckpt", "out"], "junk.ckpt cannot be read"),
    "another's": (["convert", "other.ckpt", "out"], "other.ckpt holds no stack"),
    "not ours": (["convert", "good", "precious"], "precious is no checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_words_are_sentences(
    name: str, eulerstack: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved.rename("good")
    Path("precious").mkdir()
    Path("junk.ckpt").write_bytes(b"junk")
    torch.save({"weights": 1}, "other.ckpt")
    es.save_checkpoint(es.load_checkpoint("good"), "cut")
    es.save_checkpoint(es.load_checkpoint("good"), "run/checkpoint")
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-5])
    words, wanted = BAD[name]
    done = eulerstack("checkpoint", *words)
    assert done.exit_code == 2
    assert wanted in done.output
    assert not Path("out").exists()
