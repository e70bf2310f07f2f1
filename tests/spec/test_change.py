"""--set KEY=VALUE: what it changes, and what it says of a key or a value that cannot be."""

import re
from pathlib import Path

import pytest

import eulerstack as es

NAME = "every_mixer_mini"


def test_values_are_yaml_and_reach_mappings_lists_and_what_the_file_left_out() -> None:
    settings = ["model.d_model=256", "layer_schedule.0.repeat=3", "training_hints.betas=[0.8, 0.99]"]
    settings += ["embedding.rope_scaling.factor=2", "embedding.rope_scaling.type=yarn", "model.mlp_ratio=${1 + 2}"]
    spec = es.load(NAME, settings)
    assert (spec.model.d_model, spec.model.mlp_ratio, spec.training_hints.betas) == (256, 3, (0.8, 0.99))
    assert len(es.expand(spec)) == len(es.expand(es.load(NAME))) + 2
    assert spec.embedding.rope_scaling is not None and spec.embedding.rope_scaling.type == "yarn"
    assert es.load(NAME, ["model.d_model=512", "model.d_model=128"]) == es.load(NAME)  # the last one counts


def test_let_and_names_with_dots(tmp_path: Path) -> None:
    text = es.presets()[NAME].read_text().replace("d_model: 128", "d_model: ${let.d}").replace("rwkv:", "r.w:", 1)
    file = tmp_path / "x.yml"
    file.write_text("let: {d: 128}\n" + text.replace("template: rwkv", "template: r.w"))
    assert es.load(file) == es.load(file, ["let.d=128"])
    spec = es.load(file, ["let.d=256", "layer_templates.r.w.mixer.rwkv.chunk_size=8"])
    assert spec.model.d_model == 256
    assert any(getattr(layer.mixer, "chunk_size", 0) == 8 for layer in es.expand(spec))


BAD = {
    "model.d_mdel=2": "Setting: --set model.d_mdel: there is no key 'd_mdel' below model\nFix: did you mean 'd_model'?",
    "layer_templates.mamba3.mixer.type=retnet": "no key 'mamba3' below layer_templates\nFix: did you mean 'mamba2'?",
    "layer_schedule.99.repeat=2": "'99' is no place in a list of 8\nFix: use 0 to 7",
    "layer_schedule.first.repeat=2": "'first' is no place in a list",
    "model.d_model.x=1": "nothing stands below d_model, which is 128\nFix: remove .x",
    "let.d=1": "there is no key 'let' at the top",
    "model.d_model": "Setting: --set model.d_model: has no value\nFix: write KEY=VALUE",
    "=3": "there is no key ''",
    "training_hints.betas=[0.9": "YAML: --set training_hints.betas",
    "model.d_model='64'": "Type: --set model.d_model: '64' is not a whole number",
    "model.d_model=64.5": "Type: --set model.d_model: 64.5 is not a whole number",
    "model.n_heads=3": "Compatibility: --set model.n_heads: 3 does not divide model.d_model = 128",
    "layer_templates.rwkv.mixer.rwkv={chunk: 1}": "--set layer_templates.rwkv.mixer.rwkv: layer_templates.rwkv.mixer.rwkv.chunk",
    "model=": "Type: --set model: nothing is not a mapping",
}  # fmt: skip


@pytest.mark.parametrize("setting", BAD)
def test_what_cannot_be_set_is_a_sentence(setting: str) -> None:
    with pytest.raises(es.SpecError) as error:
        es.load(NAME, [setting])
    assert BAD[setting] in str(error.value)


def test_problems_of_the_file_and_of_settings_come_together() -> None:
    text = re.sub(r"max_seq_len: \d+", "max_seq_len: x", es.presets()[NAME].read_text())
    with pytest.raises(es.SpecError) as error:
        es.loads(text, "a.yml", ["model.d_mdel=2", "model.n_heads=0"])
    places = [line.split(": ")[1] for line in str(error.value).splitlines() if not line.startswith(("Fix", "See"))]
    assert sorted(place.partition(":")[0] for place in places) == ["--set model.d_mdel", "--set model.n_heads", "a.yml"]
