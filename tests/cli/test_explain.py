"""explain: each fact of a stack is in the tree and in the picture."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import eulerstack as es

Run = Callable[..., Result]

STACK = """\
schema_version: 1
model: {name: shown, d_model: 64, n_heads: 4, vocab_size: 256, max_seq_len: 128}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  m: {mixer: {type: mamba, mamba: {d_state: 16}}, ffn: {type: none}}
  a: {mixer: {type: attention}, ffn: {type: gated_mlp}}
  e: {mixer: {type: retnet}, ffn: {type: moe, moe: {experts: 4, top_k: 2}}}
  b:
    mixer: {type: branched, branched: {branches: {near: {type: attention, attention: {window: 8}}, far: {type: hyena}}}}
    ffn: {type: mlp}
layer_schedule:
  - {pattern: [m, m, {template: a, shared: whole}], repeat: 3}
  - {template: a, override: {attention: {window: 16}, residual: {scaling: 0.5}}}
  - {template: e}
  - {template: b, repeat: 5}
head: {type: causal_lm}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shown.yml"
    path.write_text(STACK)
    return path


def test_the_tree_tells_repeats_overrides_shared_weights_and_branches(file: Path, eulerstack: Run) -> None:
    done = eulerstack("explain", str(file))
    assert done.exit_code == 0, done.output
    cost = es.estimate(es.load(file))
    wanted = [
        f"shown: {cost.parameters:,} parameters",
        "16 layers, d_model 64, 4 heads of 4 kv: 3 x [mamba2 mamba2 attention], attention(16), retnet+moe, 5 x attention(8) | hyena",
        "3 x [mamba2 mamba2 attention]  layers 0-8",
        "  0-1  m\n",
        "    9  a\n",
        "11-15  b\n",
        "2 mixers side by side: sum",
        "near is attention: ",
        "far is hyena: ",
        "moe, 2 of 4 experts, swiglu, 64 to 256",
        "named by layer_schedule.1, whose override has residual.scaling 0.5, attention.window 16",
        "one set of weights for 3 layers, counted once",
        f"{cost.layers[2].parameters:,} parameters",
        "kernels",
    ]
    assert [line for line in wanted if line not in done.output] == []


def test_a_setting_is_explained(file: Path, eulerstack: Run) -> None:
    done = eulerstack("explain", str(file), "--set", "layer_schedule.0.repeat=4", "--set", "model.d_model=128")
    assert "19 layers, d_model 128" in done.output
    done = eulerstack("explain", str(file), "--set", "model.mup={d_model: 32, n_heads: 2}")
    assert "muP: the learning rates of d_model 32 with 2 heads" in done.output
    done = eulerstack("explain", str(file), "--set", "model.d_mdel=128")
    assert done.exit_code == 2
    assert "did you mean 'd_model'?" in done.output


def texts(picture: str) -> list[str]:
    root = ET.fromstring(picture)
    return [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_is_whole_and_stands_alone(file: Path, eulerstack: Run, tmp_path: Path) -> None:
    out = tmp_path / "shown.svg"
    assert eulerstack("explain", str(file), "--picture", str(out)).exit_code == 0
    picture, cost = out.read_text(), es.estimate(es.load(file))
    assert picture.count("http") == 1  # the namespace alone
    said = texts(picture)
    for wanted in ("shown", "3 \u00d7", "2 \u00d7", "5 \u00d7", "weights shared by 3 layers", "moe, 2 of 4 experts"):
        assert wanted in said, wanted
    assert "hyena: 5 layers" in said
    assert any("override: " in text for text in said)
    assert f"{cost.parameters / 1e3:.3g} k in all" in said
    boxes = [node for node in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect") if "x" in node.attrib]
    assert all(float(box.attrib["x"]) + float(box.attrib["width"]) <= 1240 - 40 for box in boxes)


def test_a_page_holds_the_same_picture(file: Path, eulerstack: Run, tmp_path: Path) -> None:
    for name in ("a.svg", "a.html"):
        assert eulerstack("explain", str(file), "--picture", str(tmp_path / name)).exit_code == 0
    assert (tmp_path / "a.svg").read_text() in (tmp_path / "a.html").read_text()
    done = eulerstack("explain", str(file), "--picture", str(tmp_path / "a.png"))
    assert done.exit_code == 2
    assert "give a name that ends in .svg or .html" in done.output
    done = eulerstack("explain", str(file), "--picture", str(tmp_path / "none" / "a.svg"))
    assert done.exit_code == 2


def test_a_name_cannot_break_the_picture(eulerstack: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.svg"
    file.write_text(STACK.replace("  m:", '  "<&>":').replace("[m, m,", '["<&>", "<&>",'))
    assert eulerstack("explain", str(file), "--picture", str(out)).exit_code == 0
    ET.parse(out)


@pytest.mark.parametrize("name", [n for n in es.presets() if n.endswith("_mini")])
def test_every_mini_is_drawn(name: str, eulerstack: Run, tmp_path: Path) -> None:
    done = eulerstack("explain", name, "--picture", str(tmp_path / "x.svg"))
    assert done.exit_code == 0, done.output
    assert name in texts((tmp_path / "x.svg").read_text())
