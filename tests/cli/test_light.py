"""presets list, compile, diff and doctor."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

import eulerstack as es
from eulerstack.cli.compare import differences
from eulerstack.cli.main import cli
from eulerstack.kernels.provider import Target
from eulerstack.kernels.select import PROVIDERS, select

Run = Callable[..., Result]
MINI = "arch_expert_research_mini"


def test_presets_are_a_table(eulerstack: Run) -> None:
    lines = eulerstack("presets", "list").output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(es.presets())
    line = next(line for line in lines if line.startswith(f"{MINI} "))
    assert "3 mamba2, 2 retnet, 1 attention" in line
    text = es.presets()[MINI].read_text()
    assert line.rpartition("  ")[2] in text
    start = lines[0].index("layers")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def test_light_verbs_load_no_torch(tmp_path: Path) -> None:
    verbs = [
        ["presets", "list"],
        ["compile", MINI],
        ["diff", MINI, MINI],
        ["validate", MINI, "--set", "model.d_model=512"],
    ]
    code = "import sys; from click.testing import CliRunner; from eulerstack.cli.main import cli\n"
    code += f"for words in {verbs!r}:\n    assert CliRunner().invoke(cli, words).exit_code == 0, words\n"
    code += "    assert not {'torch', 'numpy'} & set(sys.modules), words\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_compile_writes_every_layer_with_all_its_values(eulerstack: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    words = ["--set", "layer_schedule.0.repeat=2", "--set", "layer_schedule.0.override.residual.scaling=0.5"]
    done = eulerstack("compile", "--preset", "every_mixer_mini", *words, "--output", str(out))
    assert done.exit_code == 0, done.output
    data, plan = json.loads(out.read_text()), es.expand(es.load("every_mixer_mini", words[1::2]))
    assert [layer["template"] for layer in data["layers"]] == [layer.template for layer in plan]
    assert [layer["ffn"]["hidden"] for layer in data["layers"]] == [layer.hidden for layer in plan]
    assert [layer["residual"]["scaling"] for layer in data["layers"][:3]] == [0.5, 0.5, 1.0]
    assert [layer["origin"] for layer in data["layers"][:3]] == [
        "layer_schedule.0",
        "layer_schedule.0",
        "layer_schedule.1",
    ]
    assert data["layers"][0]["mixer"] == {
        "type": "mamba",
        "variant": "mamba1",
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "dt_rank": 8,
        "chunk_size": 64,
    }
    assert data["layers"][0]["override"] == {"residual": {"scaling": 0.5}}
    assert data["model"]["n_kv_heads"] == 4 and data["head"]["tie_weights"] is True
    assert data["provenance"]["settings"] == words[1::2]
    assert eulerstack("compile", "every_mixer_mini", *words).output == out.read_text()


def test_compile_is_the_same_for_files_that_mean_the_same(eulerstack: Run, tmp_path: Path) -> None:
    compiled = []
    for text in (es.presets()[MINI].read_text(), es.dump(es.load(MINI))):
        file = tmp_path / "x.yml"
        file.write_text(text)
        compiled.append(eulerstack("compile", str(file)).output)
    assert compiled[0] == compiled[1]


def test_branches_and_later_heads_are_compiled(eulerstack: Run) -> None:
    branches = "{near: {type: attention, attention: {window: 8}}, far: {type: mamba, mamba: {variant: mamba1}}}"
    words = ["--set", f"layer_templates.rwkv.mixer={{type: branched, branched: {{branches: {branches}}}}}"]
    words += ["--set", "head={type: causal_lm_mtp, mtp: {n_predict: 2, head_template: mamba2}}"]
    data = json.loads(eulerstack("compile", "every_mixer_mini", *words).output)
    mixer = next(layer["mixer"] for layer in data["layers"] if layer["template"] == "rwkv")
    assert mixer["branches"]["near"]["window"] == 8
    assert mixer["branches"]["far"]["dt_rank"] == 8
    assert [[layer["template"] for layer in module] for module in data["ahead"]] == [["mamba2"], ["mamba2"]]


CHANGES = {
    "model.n_kv_heads=1": {"heads of keys and values": ("2", "1")},
    "model.mup.d_model=128": {"muP": ("none", "from d_model 128, 4 heads")},
    "model.mlp_ratio=2": {"FFNs": ("6 gated_mlp swiglu of 256", "6 gated_mlp swiglu of 512"), "layers that differ": ("all 6", "all 6")},
    "layer_templates.retnet_layer.mixer.retnet.gamma=learned": {"retnet.gamma": ("eq8", "learned"), "layers that differ": ("1, 3", "1, 3")},
    "layer_schedule.4.template=attn_layer": {
        "mixers": ("3 mamba2, 2 retnet, 1 attention", "2 mamba2, 2 retnet, 2 attention"),
        "order": ("2 x [mamba2 retnet], mamba2, attention", "2 x [mamba2 retnet], 2 x attention"),
        "layers that differ": ("4", "4"),
    },
    "embedding.tie_word_embeddings=false": {"embedding.tie_word_embeddings": ("true", "false")},
    "head.logit_softcap=30": {"head.logit_softcap": ("null", "30.0")},
    "training_hints.lr_peak=0.5": {"training_hints.lr_peak": ("0.003", "0.5")},
    "layer_templates.attn_layer.norm.position=post": {
        "norms and residuals": ("6 pre-rmsnorm, sequential residual", "5 pre-rmsnorm, sequential residual, 1 post-rmsnorm, sequential residual"),
        "layers that differ": ("5", "5"),
    },
    "model.name=other": {},
    "model.target_params=4000000": {},
}  # fmt: skip


@pytest.mark.parametrize("setting", CHANGES)
def test_a_changed_decision_is_named_and_nothing_else(setting: str) -> None:
    assert differences(es.load(MINI), es.load(MINI, [setting])) == CHANGES[setting]


def test_template_names_and_ways_to_write_are_no_difference() -> None:
    b = [es.StackBuilder(d_model=32, n_heads=2), es.StackBuilder(d_model=32, n_heads=2, n_kv_heads=2, name="y")]
    b[0].add("retnet").add("retnet")
    b[1].add("retnet", {"gamma": "eq8"}, repeat=2)
    assert differences(b[0].spec(), b[1].spec()) == {}


def test_equal_counts_in_another_order_differ() -> None:
    text = ["layer_schedule.0.override.residual.scaling=0.5", "layer_schedule.2.override.residual.scaling=0.5"]
    specs = [es.load(MINI, [setting]) for setting in text]
    assert differences(*specs)["layers that differ"] == ("0, 2", "0, 2")


def test_diff_counts_what_both_cost(eulerstack: Run) -> None:
    output = eulerstack("diff", MINI, f"{MINI}_mamba").output
    for name in (MINI, f"{MINI}_mamba"):
        assert f"{es.estimate(es.load(name)).parameters:,}" in output
    assert f"state at {min(8192, es.load(MINI).model.max_seq_len):,} tokens" in output
    assert eulerstack("diff", MINI, MINI).output == f"{MINI} and {MINI} are the same design\n"
    done = eulerstack("diff", MINI)
    assert done.exit_code == 2
    assert "give two stacks" in done.output
    assert "heads of keys and values" in eulerstack("diff", MINI, "--set", "model.n_kv_heads=1").output


def test_doctor_answers_for_every_provider(eulerstack: Run) -> None:
    done = eulerstack("doctor")
    assert done.exit_code == 0, done.output
    rows = [line.split(maxsplit=3) for line in done.output.partition("operation")[2].splitlines()[1:]]
    found = {(row[0], row[1]): row for row in rows}
    assert set(found) == {(operation, name) for operation, names in PROVIDERS.items() for name in names}
    for (operation, name), row in found.items():
        assert (row[2] == "auto") == (name == select(operation, Target()).provider) or "cuda" in done.output
        assert row[2] in ("auto", "yes") or len(row) == 4, row
    for row in rows:
        if "is not installed" in " ".join(row):
            assert "pip install" in row[3]


def verbs() -> list[str]:
    groups = [(name, command) for name, command in cli.commands.items()]
    return [f"{name} {verb}" for name, c in groups if isinstance(c, click.Group) for verb in c.commands] + [
        name for name, command in groups if not isinstance(command, click.Group) and name not in ("fit", "test")
    ]  # whose help is Lightning's


@pytest.mark.parametrize("verb", verbs())
def test_help_teaches_by_an_example(verb: str, eulerstack: Run) -> None:
    assert f"  eulerstack {verb}" in eulerstack(*verb.split(), "--help").output
