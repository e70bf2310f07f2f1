"""Bad input: a message that names the key and the line, exit 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

import eulerstack as es

MINI = (Path(__file__).parents[2] / "presets" / "arch_expert_research_mini.yml").read_text()
GOOD = "# a line above\n" + MINI[MINI.index("schema_version") :]

BAD: dict[str, tuple[str, str, str]] = {
    # name: (text in the good file, what it becomes, what the message must say after FILE:LINE:)
    "word for a number": ("chunk_size: 64", "chunk_size: big", "chunk_size: 'big' is not a whole number"),
    "quoted word for a bool": ("rope: true}", 'rope: "no"}', "rope: 'no' is neither true nor false"),
    "yaml 1.1 bool": ("rope: true}", "rope: no}", "rope: 'no' is neither true nor false"),
    "negative size": ("chunk_size: 64", "chunk_size: -8", "chunk_size: -8 is less than 1"),
    "fraction for a whole number": ("d_model: 256", "d_model: 64.9", "model.d_model: 64.9 is not a whole number"),
    "quoted number": ("d_model: 256", 'd_model: "64"', "model.d_model: '64' is not a whole number"),
    "bool for a number": ("n_heads: 4", "n_heads: true", "model.n_heads: true is not a whole number"),
    "infinity": ("d_model: 256", "d_model: .inf", "model.d_model: inf is not a whole number"),
    "nan": ("lr_peak: 3e-3", "lr_peak: .nan", "training_hints.lr_peak: nan is not finite"),
    "duplicate key": ("  d_model: 256\n", "  d_model: 256\n  d_model: 128\n", "model.d_model: given twice, first in line 5"),
    "duplicate template": ("  retnet_layer:\n", "  mamba_layer: {}\n  retnet_layer:\n", "layer_templates.mamba_layer: given twice"),
    "word for a mapping": ("    mixer: {type: attention}", "    mixer: attention", "layer_templates.attn_layer.mixer"),
    "norm as a word": ("    mixer: {type: attention}", "    norm: rmsnorm\n    mixer: {type: attention}", "norm: 'rmsnorm' is not a mapping"),
    "list for a mapping": ("{type: attention}", "{type: attention, attention: [1, 2]}", "mixer.attention: [1, 2] is not a mapping"),
    "unknown key": ("max_seq_len: 8192", "max_seq_length: 8192", "model.max_seq_length: is not a key of the language here"),
    "missing key": ("  max_seq_len: 8192\n", "", "model.max_seq_len: is required and missing"),
    "missing block": ("head:\n  type: causal_lm\n", "", "head: is required and missing"),
    "unknown mixer": ("type: attention", "type: atention", "mixer.type: 'atention' is not one of"),
    "two mixers": ("{type: attention}", "{type: attention, mamba: {}}", "mixer.mamba: is not a key"),
    "v1 mixer not here yet": ("{type: attention}", "{type: ttt_layer}", "'ttt_layer' is not supported; a retnet"),
    "h3": ("{type: attention}", "{type: h3}", "mixer.type: 'h3' is not one of the mixers"),
    "dilated windows": ("{type: attention}", "{type: attention, attention: {window_dilation: 2}}", "window_dilation: is not supported (dilated windows)"),
    "sliding over nothing": ("{type: attention}", "{type: attention, attention: {window_mode: sliding}}", "attention.window_mode: sliding needs a window"),
    "a head of several without mtp": ("  type: causal_lm", "  type: causal_lm_mtp", "head.mtp: is required by head.type: causal_lm_mtp"),
    "mtp with a head of one": ("  type: causal_lm", "  type: causal_lm\n  mtp: {head_template: attn_layer}", "head.mtp: does nothing with head.type: causal_lm"),
    "mtp of nothing": ("  type: causal_lm", "  type: causal_lm_mtp\n  mtp: {head_template: attn_layr}", "head.mtp.head_template: 'attn_layr' is not one of layer_templates"),
    "capacity": ("{type: gated_mlp, activation: swiglu}", "{type: moe, moe: {capacity_factor: 1.2}}", "ffn.moe.capacity_factor: would drop tokens by what comes after them"),
    "more choices than experts": ("{type: gated_mlp, activation: swiglu}", "{type: moe, moe: {experts: 2, top_k: 3}}", "ffn.moe.top_k: 3 are more than the 2 experts"),
    "latent too wide": ("{type: attention}", "{type: attention, attention: {latent_dim: 256}}", "attention.latent_dim: 256 is not below d_model = 256"),
    "rotated key without a latent": ("{type: attention}", "{type: attention, attention: {rope_head_dim: 32}}", "rope_head_dim: is the latent cache's"),
    "odd rotated key": ("{type: attention}", "{type: attention, attention: {latent_dim: 64, rope_head_dim: 3}}", "rope_head_dim: rope turns pairs of channels, not 3"),
    "norm of a latent head": ("{type: attention}", "{type: attention, attention: {latent_dim: 64, qk_norm: true}}", "qk_norm: does not go with latent_dim"),
    "another mamba": ("variant: mamba2", "variant: mamba3", "mamba.variant: 'mamba3' is not one of mamba1, mamba2"),
    "a key of the other mamba": ("variant: mamba2, d_state: 64}", "variant: mamba1, head_dim: 64}", "mamba.head_dim: is not a key of the language here"),
    "gamma above one": ("rope: true}", "gamma: 1.5}", "retnet.gamma"),
    "unknown gamma": ("rope: true}", "gamma: eq9}", "retnet.gamma: 'eq9'"),
    "scaling that depends on the length": ("positional: rope", "rope_scaling: {type: dynamic, factor: 2}", "rope_scaling.type: 'dynamic' scales by the sequence's length"),
    "an original length that does nothing": ("positional: rope", "rope_scaling: {type: ntk, factor: 2, original_max_seq_len: 100}", "original_max_seq_len: ntk scaling needs no original length"),
    "sinks of nothing": ("{type: attention}", "{type: attention, attention: {attention_sinks: {n_per_head: 0}}}", "n_per_head: 0 is less than 1"),
    "enum as a list": ("variant: mamba2", "variant: [mamba2]", "variant: ['mamba2'] is not one of mamba1, mamba2"),
    "heads do not divide": ("n_heads: 4", "n_heads: 3", "model.n_heads: 3 does not divide model.d_model = 256"),
    "kv heads do not divide": ("n_kv_heads: 2", "n_kv_heads: 3", "model.n_kv_heads: 3 does not divide model.n_heads = 4"),
    "head_dim does not divide": ("d_state: 64}", "d_state: 64, head_dim: 60}", "head_dim: 60 does not divide"),
    "no such template": ("template: attn_layer", "template: attn", "layer_schedule.5.template: 'attn' is not one of layer_templates"),
    "repeat of nothing": ("{template: attn_layer, repeat: 1}", "{template: attn_layer, repeat: 0}", "repeat: 0 is less than 1"),
    "repeat without end": ("{template: attn_layer, repeat: 1}", "{template: attn_layer, repeat: 10000000}", "repeat: 10000000 is more than 4096"),
    "absurd width": ("d_model: 256", "d_model: 4000000000000000", "model.d_model: 4000000000000000 is more than"),
    "wrong state": ("state: {ssm_state: true}", "state: {kv_cache: true}", "state.kv_cache: a mamba mixer has no kv_cache"),
    "small vocabulary": ("vocab_size: 256", "vocab_size: 100", "model.vocab_size: 100 is less than the byte tokenizer's 256"),
    "ties contradict": ("head:\n  type: causal_lm", "head:\n  type: causal_lm\n  tie_weights: false", "head.tie_weights: false contradicts"),
    "integer key": ("  mamba_layer:\n", "  7:\n", "the key '7' is no word"),
    "empty schedule": (GOOD[GOOD.index("layer_schedule") : GOOD.index("head:")], "layer_schedule: []\n", "layer_schedule: is empty"),
    "broken syntax": ("{type: attention}", "{type: attention", "not YAML"),
    "a tag": ("d_model: 256", "d_model: !!python/name:os.system 256", "the tag"),
    "a merge key": ("{type: attention}", "{<<: {}, type: attention}", "merge keys"),
    "an undefined alias": ("{type: attention}", "*nothing", "the alias *nothing has no anchor before it"),
    "two documents": ("schema_version: 1", "a: 1\n---\nschema_version: 1", "more than one YAML document"),
    "too deep": ("d_model: 256", "d_model: " + "[" * 100 + "]" * 100, "nested deeper than"),
    "wrong version": ("schema_version: 1", "schema_version: 2", "schema_version: 2 is more than 1"),
    "version as a bool": ("schema_version: 1", "schema_version: true", "schema_version: true is not a whole number"),
    "a name that is a path": ("name: arch_expert_research_mini", "name: ../up", "model.name: '../up' cannot be a name"),
    "beta of one": ("lr_peak: 3e-3", "betas: [0.9, 1]", "training_hints.betas.1: 1 is not less than 1"),
    "no width left": ("mlp_ratio: 1.0", "mlp_ratio: 1.0e-4", "model.mlp_ratio: 0.0001 times d_model = 256 leaves no channel"),
    "an expression": ("d_model: 256", "d_model: ${let.d}", "model.d_model: '${let.d}': let.d is not named above it"),
    "a null document first": ("schema_version: 1", "---\n---\nschema_version: 1", "more than one YAML document"),
    "a very long number": ("d_model: 256", "d_model: 0x" + "f" * 50, "model.d_model:"),
    "probability above one": ("lr_peak: 3e-3", "lr_floor_ratio: 1.5", "training_hints.lr_floor_ratio: 1.5 is more than 1"),
}  # fmt: skip


def write(folder: Path, name: str) -> tuple[Path, str, int]:
    """The bad file, what its message must say, and the line where the change was made."""
    before, after, wanted = BAD[name]
    assert before in GOOD
    file = folder / "bad.yml"
    file.write_text(GOOD.replace(before, after, 1))
    return file, wanted, GOOD[: GOOD.index(before)].count("\n") + 1


@pytest.mark.parametrize("name", BAD)
def test_message_names_key_and_line(name: str, tmp_path: Path) -> None:
    file, wanted, line = write(tmp_path, name)
    with pytest.raises(es.SpecError) as error:
        es.load(file)
    text = str(error.value)
    assert wanted in text
    assert "\nFix: " in text
    places = [p.line for p in error.value.problems]
    assert any(place is not None and abs(place - line) <= 3 for place in places) or name.startswith("missing"), (
        places,
        line,
    )


@pytest.mark.parametrize("name", [*list(BAD)[::9], pytest.param(None, marks=pytest.mark.slow)])
def test_command_line_exits_2_without_a_traceback(name: str | None, tmp_path: Path) -> None:
    for chosen in BAD if name is None else [name]:
        file, wanted, _ = write(tmp_path, chosen)
        for verb in (["validate"], ["explain"], ["fit", "--preset"]):
            done = subprocess.run(
                [sys.executable, "-m", "eulerstack", *verb, str(file)], capture_output=True, text=True
            )
            assert done.returncode == 2, done.stderr
            assert wanted in done.stderr
            assert "Traceback" not in done.stderr + done.stdout
            if name is None:
                break


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = (
        GOOD.replace("d_model: 256", "d_model: 2x")
        .replace("chunk_size: 64", "chunk_sze: 64")
        .replace("n_heads: 4", "n_heads: 0")
    )
    with pytest.raises(es.SpecError) as error:
        es.loads(text)
    assert [p.key.rpartition(".")[2] for p in error.value.problems] == ["d_model", "n_heads", "chunk_sze"]
    assert "did you mean 'chunk_size'?" in str(error.value)


@pytest.mark.parametrize("path", ["nothing.yml", "arch_expert_reserch_mini", "."])
def test_files_that_are_none(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(es.SpecError, match=r"there is no such file|Is a directory"):
        es.load(path)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00junk", b"\x00\x01", b"", b"- 1\n- 2\n", b"just words", b"a: \x07"])
def test_contents_that_are_no_stack(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_bytes(data)
    with pytest.raises(es.SpecError):
        es.load(file)


def test_bombs_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(es.SpecError, match="expands to more than"):
        es.loads("\n".join(lines))
    with pytest.raises(es.SpecError, match="more than 1,000,000 characters"):
        es.loads("a" * 2_000_000)
