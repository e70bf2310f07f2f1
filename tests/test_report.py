"""validate --report and --json: what is unlikely to be meant, and errors, for programs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import eulerstack as es
from eulerstack.cli.report import report
from eulerstack.cli.validate import as_json
from tests.spec.test_planted import FILES

GOOD = """
schema_version: 1
model: {name: good, d_model: 256, n_heads: 4, n_kv_heads: 1, vocab_size: 256, max_seq_len: 1024, target_params: 2900000}
tokenizer_contract: {type: byte}
embedding: {type: learned, positional: none}
layer_templates:
  a: {mixer: {type: attention}, ffn: {type: gated_mlp, mlp_ratio: 3}}
  m: {mixer: {type: mamba, mamba: {head_dim: 8}}, ffn: {type: moe, mlp_ratio: 0.5, moe: {experts: 4, top_k: 2}}}
layer_schedule: [{template: a, repeat: 2}, {template: m}]
head: {type: causal_lm}
"""
ODD = {
    "small heads": ("n_heads: 4", "n_heads: 32", "model.n_heads", 3),
    "odd heads": ("d_model: 256, n_heads: 4", "d_model: 252, n_heads: 12", "model.n_heads", 3),
    "a wide FFN": ("mlp_ratio: 3", "mlp_ratio: 32", "layer_templates.a.ffn", 7),
    "narrow experts": ("mlp_ratio: 0.5", "mlp_ratio: 0.1", "layer_templates.m.ffn", 8),
    "all experts": ("top_k: 2", "top_k: 4", "layer_templates.m.ffn.moe.top_k", 8),
    "a window of everything": (
        "{type: attention}",
        "{type: attention, attention: {window: 1024}}",
        "layer_templates.a.mixer.attention.window",
        7,
    ),
    "another target": ("target_params: 2900000", "target_params: 9000000", "model.target_params", 3),
    "idle rows": ("vocab_size: 256", "vocab_size: 512", "model.vocab_size", 3),
    "no tokenizer": ("{type: byte}", "{type: hf, pretrained: nowhere}", "tokenizer_contract.pretrained", 4),
    "a long cache": ("max_seq_len: 1024", "max_seq_len: 100000", "model.max_seq_len", 3),
    "a huge cache": ("max_seq_len: 1024", "max_seq_len: 16000000", "model.max_seq_len", 3),
    "mostly embedding": ("vocab_size: 256", "vocab_size: 32000", "model.vocab_size", 3),
}


def told(text: str, folder: Path) -> list[Any]:
    file = folder / "good.yml"
    file.write_text(text)
    return [(p.key, p.line) for p in report(es.load(file), str(file))]


def test_a_usual_stack_has_nothing_to_report(tmp_path: Path) -> None:
    assert told(GOOD, tmp_path) == []


@pytest.mark.parametrize("name", ODD)
def test_what_is_unlikely_is_reported_with_its_place(name: str, tmp_path: Path) -> None:
    before, after, key, line = ODD[name]
    assert before in GOOD
    assert (key, line) in told(GOOD.replace(before, after), tmp_path)


def test_json_holds_errors_with_all_that_a_program_needs(tmp_path: Path) -> None:
    file = tmp_path / "bad.yml"
    file.write_text(FILES["widths"])
    text, good = as_json(str(file), (), realism=True)
    errors = {error["path"]: error for error in json.loads(text)["errors"]}
    assert not good
    dtype = errors["model.dtype"]
    assert (dtype["line"], dtype["value"], dtype["near"]) == (10, "bflot16", "bfloat16")
    assert dtype["allowed"] == ["float32", "bfloat16", "float16"]
    assert dtype["see"] == "docs/errors.md#choice"
    assert errors["model.mlp_ratio"]["allowed"] == "a number above 0 up to 64"


def test_the_verb_reports_and_says_by_its_exit_code_whether_the_file_is_good(tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    for text, code in ((GOOD.replace("n_heads: 4", "n_heads: 32"), 0), (FILES["widths"], 2)):
        file.write_text(text)
        command = [sys.executable, "-m", "eulerstack", "validate", str(file), "--report", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code
        found = json.loads(done.stdout)
        assert found["ok"] == (code == 0)
        assert found["warnings" if code == 0 else "errors"]
