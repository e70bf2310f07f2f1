"""What a stack file may say, and that it means it."""

import subprocess
import sys
from pathlib import Path

import pytest

import eulerstack as es
from eulerstack.spec import RetNetSpec, with_hints

SEED = """
schema_version: 1
model: {name: seed, d_model: 64, n_heads: 4, vocab_size: 256, max_seq_len: 512}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  mamba_layer:
    mixer: {type: mamba}
    ffn: {type: gated_mlp, activation: swiglu}
  retnet_layer:
    mixer:
      type: retnet
      retnet:
        chunkwise: true
        chunk_size: 128
        rope: true
    ffn:
      type: gated_mlp
      activation: swiglu
    state:
      kv_cache: true
  attn_layer:
    mixer: {type: attention}
    ffn: {type: none}
layer_schedule:
  - template: mamba_layer
    repeat: 1
  - template: retnet_layer
    repeat: 1
  - template: attn_layer
    repeat: 1
  # ... three inductive biases cooperating
head: {type: causal_lm}
training_hints: {lr_peak: 3e-4, betas: [0.9, 0.999]}
"""


def test_the_published_snippets_load_as_written() -> None:
    spec = es.loads(SEED)
    layers = es.expand(spec)
    assert [layer.mixer_type for layer in layers] == ["mamba", "retnet", "attention"]
    assert layers[1].mixer == RetNetSpec(chunk_size=128)
    assert layers[1].hidden == 256
    assert layers[2].hidden == 0
    assert spec.training_hints.lr_peak == 3e-4


@pytest.mark.parametrize("name", sorted(es.presets()))
def test_presets_load_dump_and_build(name: str) -> None:
    spec = es.load(name)
    assert es.loads(es.dump(spec)) == spec
    assert spec.model.name == name
    assert es.estimate(spec).parameters > 0


def test_specs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        es.loads(SEED).model.d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["1e3", "0o17", "no", "null", "1_000", "1:30", "2001-01-01", ".5", "0x1f", "true"])
def test_names_that_look_like_values_survive_the_round_trip(name: str) -> None:
    quoted = SEED.replace("name: seed", f'name: "{name.replace(":", "-").lstrip(".")}"')
    spec = es.loads(quoted.replace("attn_layer", f'"{name}"'))
    assert es.loads(es.dump(spec)) == spec


def test_a_stack_without_positions_survives_the_round_trip() -> None:
    builder = es.StackBuilder(64, 4, embedding={"type": "learned", "positional": "none"}).add("mamba")
    assert es.loads(es.dump(builder.spec())) == builder.spec()
    assert with_hints(builder.spec(), {"lr_peak": 1e-3}).training_hints.lr_peak == 1e-3


def test_no_clipping_survives_the_round_trip() -> None:
    spec = es.loads(SEED.replace("lr_peak: 3e-4", "grad_clip: null"))
    assert spec.training_hints.grad_clip is None
    assert es.loads(es.dump(spec)) == spec


def test_unused_templates_are_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_text(SEED.replace("  - template: attn_layer\n    repeat: 1\n", ""))
    done = subprocess.run([sys.executable, "-m", "eulerstack", "validate", str(file)], capture_output=True, text=True)
    assert done.returncode == 0
    assert "layer_templates.attn_layer is in no entry" in done.stderr


@pytest.mark.parametrize(
    "verb", ["validate", "validate --json", "presets list", "presets show arch_expert_research_mini"]
)
def test_light_verbs_load_no_torch(verb: str) -> None:
    words = [*verb.split(), *(["arch_expert_research_mini"] if verb.startswith("validate") else [])]
    code = f"import sys; sys.argv = ['eulerstack', *{words!r}]\nfrom eulerstack.cli.main import cli\n"
    code += "cli(standalone_mode=False); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, eulerstack as es; es.load('arch_expert_research_mini'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(es.__all__) == set(dir(es))
    for name in es.__all__:
        assert getattr(es, name) is not None


KEYS = {
    "mamba d_state": ("{type: mamba}", "{type: mamba, mamba: {d_state: 16}}"),
    "mamba expand": ("{type: mamba}", "{type: mamba, mamba: {expand: 4}}"),
    "mamba d_conv": ("{type: mamba}", "{type: mamba, mamba: {d_conv: 3}}"),
    "mamba head_dim": ("{type: mamba}", "{type: mamba, mamba: {head_dim: 32}}"),
    "mamba n_groups": ("{type: mamba}", "{type: mamba, mamba: {n_groups: 2}}"),
    "value_expand": ("rope: true", "value_expand: 1.0"),
    "swish_gate": ("rope: true", "swish_gate: false"),
    "qkv_bias": ("{type: attention}", "{type: attention, attention: {qkv_bias: true}}"),
    "mamba1": ("{type: mamba}", "{type: mamba, mamba: {variant: mamba1}}"),
    "dt_rank": ("{type: mamba}", "{type: mamba, mamba: {variant: mamba1, dt_rank: 7}}"),
    "rwkv": ("{type: attention}", "{type: rwkv}"),
    "hyena": ("{type: attention}", "{type: hyena}"),
    "hyena depth": ("{type: attention}", "{type: hyena, hyena: {depth: 3}}"),
    "hyena filter_hidden": ("{type: attention}", "{type: hyena, hyena: {filter_hidden: 8}}"),
    "hyena d_conv": ("{type: attention}", "{type: hyena, hyena: {d_conv: 5}}"),
    "learned gamma": ("rope: true", "gamma: learned"),
    "gated gamma": ("rope: true", "gamma: gated"),
    "qk_norm": ("{type: attention}", "{type: attention, attention: {qk_norm: true}}"),
    "learned sinks": ("{type: attention}", "{type: attention, attention: {attention_sinks: {n_per_head: 2}}}"),
    "latent_dim": ("{type: attention}", "{type: attention, attention: {latent_dim: 24}}"),
    "rope_head_dim": ("{type: attention}", "{type: attention, attention: {latent_dim: 24, rope_head_dim: 4}}"),
    "experts": ("ffn: {type: none}", "ffn: {type: moe, moe: {experts: 4}}"),
    "shared experts": ("ffn: {type: none}", "ffn: {type: moe, moe: {shared_experts: 1}}"),
    "sandwich": ("    ffn: {type: none}", "    norm: {position: sandwich}\n    ffn: {type: none}"),
    "ffn type": ("ffn: {type: none}", "ffn: {type: mlp}"),
    "ffn bias": ("ffn: {type: none}", "ffn: {type: mlp, bias: true}"),
    "ffn ratio": ("activation: swiglu}", "activation: swiglu, mlp_ratio: 1.5}"),
    "norm type": ("    ffn: {type: none}", "    norm: {type: layernorm}\n    ffn: {type: none}"),
    "n_kv_heads": ("n_heads: 4", "n_heads: 4, n_kv_heads: 1"),
    "mlp_ratio": ("n_heads: 4", "n_heads: 4, mlp_ratio: 2"),
    "untied": ("{type: learned}", "{type: learned, tie_word_embeddings: false}"),
    "repeat": ("template: attn_layer\n    repeat: 1", "template: attn_layer\n    repeat: 2"),
}
SAME_SHAPE = {
    "linear attention": ("{type: attention}", "{type: linear_attention}"),
    "rope": ("rope: true", "rope: false"),
    "gamma": ("rope: true", "gamma: paper_runs"),
    "group_norm": ("rope: true", "group_norm: false"),
    "one gamma": ("rope: true", "gamma: 0.9921875"),
    "norm_before_gate": ("{type: mamba}", "{type: mamba, mamba: {norm_before_gate: true}}"),
    "softcap": ("{type: attention}", "{type: attention, attention: {logit_softcap: 1}}"),
    "fixed sinks": ("{type: attention}", "{type: attention, attention: {attention_sinks: {learnable: false}}}"),
    "alibi": ("{type: learned}", "{type: learned, positional: alibi}"),
    "linear scaling": ("{type: learned}", "{type: learned, rope_scaling: {type: linear, factor: 4}}"),
    "ntk scaling": ("{type: learned}", "{type: learned, rope_scaling: {type: ntk, factor: 4}}"),
    "yarn scaling": ("{type: learned}", "{type: learned, rope_scaling: {type: yarn, factor: 4}}"),
    "window": ("{type: attention}", "{type: attention, attention: {window: 4}}"),
    "positional": ("{type: learned}", "{type: learned, positional: none}"),
    "rope_theta": ("{type: learned}", "{type: learned, rope_theta: 50}"),
    "activation": ("activation: swiglu}", "activation: geglu}"),
    "norm position": ("    ffn: {type: none}", "    norm: {position: post}\n    ffn: {type: none}"),
    "residual type": ("activation: swiglu}", "activation: swiglu}\n    residual: {type: parallel}"),
    "residual scaling": ("    ffn: {type: none}", "    residual: {scaling: 0.5}\n    ffn: {type: none}"),
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_change_the_parameters(key: str) -> None:
    before, after = KEYS[key]
    assert before in SEED
    plain, changed = es.estimate(es.loads(SEED)), es.estimate(es.loads(SEED.replace(before, after, 1)))
    shapes = [[(n, p.shape) for n, p in cost.stack.named_parameters()] for cost in (plain, changed)]
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize("key", SAME_SHAPE)
def test_keys_that_change_what_is_computed(key: str) -> None:
    import torch

    before, after = SAME_SHAPE[key]
    assert before in SEED
    logits = []
    for text in (SEED, SEED.replace(before, after, 1)):
        torch.manual_seed(0)
        model = es.build(es.loads(text))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("proj.weight"):
                    weight.mul_(4)
            logits.append(model(torch.arange(64)[None]))
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_dtype_and_max_seq_len_act() -> None:
    import torch

    spec = es.loads(SEED.replace("max_seq_len: 512", "max_seq_len: 512, dtype: bfloat16"))
    model = es.build(spec)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.init_state(1).max_tokens == 512
