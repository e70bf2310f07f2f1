"""StackBuilder says all that a file can say."""

from typing import Any

import pytest

import eulerstack as es
from eulerstack.spec.yaml import parse


def rebuilt(data: dict[str, Any]) -> es.StackBuilder:
    """A file's data, told to the builder step by step."""
    model = data["model"]
    builder = es.StackBuilder(model["d_model"], model["n_heads"])
    builder.set(**{name: block for name, block in data.items() if not name.startswith("layer_")})
    for name, template in data["layer_templates"].items():
        builder.template(name, **template)
    for entry in data["layer_schedule"]:
        keys = dict(entry)
        builder.layers(keys.pop("template", None) or keys.pop("pattern"), **keys)
    return builder


@pytest.mark.parametrize("name", sorted(es.presets()))
def test_every_preset_can_be_built_step_by_step_and_dumped(name: str) -> None:
    spec = rebuilt(parse(es.presets()[name].read_text(), name).data).spec()
    assert spec == es.load(name)
    assert es.loads(es.dump(spec)) == spec


FILE = """
schema_version: 1
let: {width: 16, heads: 2}
model: {name: all, d_model: "${let.width * 2}", n_heads: "${let.heads}", vocab_size: 300, max_seq_len: 64, mlp_ratio: 1.5,
  target_params: 1000000}
tokenizer_contract: {type: hf, pretrained: somewhere, add_bos: true}
embedding: {type: learned, rope_theta: 500, tie_word_embeddings: false, scale: 2.0}
layer_templates:
  m: {mixer: {type: mamba, mamba: {head_dim: 8}}, ffn: {type: none}}
  a: {mixer: {type: attention}, ffn: {type: moe, moe: {experts: 4}}, norm: {position: sandwich}}
  b:
    mixer: {type: branched, branched: {branches: {x: {type: rwkv}, y: {type: hyena}}, selector: {type: learned_gate}}}
    ffn: {type: mlp}
  r: {mixer: {type: retnet}, ffn: {type: gated_mlp}, residual: {type: parallel}, state: {kv_cache: true}}
layer_schedule:
  - {pattern: m r m a, repeat: 2}
  - {pattern: [m, {template: a, shared: one}, {pattern: b r}]}
  - {template: a, shared: one}
  - {template: a, repeat: 2, override: {attention: {window: null}, residual: {scaling: 0.5}}}
head: {type: causal_lm_mtp, tie_weights: false, logit_softcap: 30.0, mtp: {n_predict: 1, head_template: r}}
training_hints: {lr_peak: 0.001, grad_clip: null}
"""


def test_the_builder_reaches_the_whole_language() -> None:
    spec = rebuilt(parse(FILE, "file").data).spec()
    assert spec == es.loads(FILE)
    assert es.loads(es.dump(spec)) == spec


def test_words_stand_for_types() -> None:
    short = es.StackBuilder(32, 2).template("x", "retnet", ffn="mlp", norm="layernorm").layers("x")
    long = es.StackBuilder(32, 2).template("x", {"type": "retnet"}, ffn={"type": "mlp"}, norm={"type": "layernorm"})
    assert short.spec() == long.layers("x").spec()


def test_blocks_are_laid_over_those_that_are_there() -> None:
    builder = es.StackBuilder(32, 2, embedding={"tie_word_embeddings": False}).add("attention")
    spec = builder.set(embedding={"positional": "none"}, head={"tie_weights": False}).spec()
    assert spec.embedding.positional == "none"
    assert not spec.tied


def test_templates_that_differ_get_names_that_differ() -> None:
    builder = es.StackBuilder(32, 2).template("retnet_2", "attention").layers("retnet_2")
    spec = builder.add("retnet").add("retnet", {"rope": False}).add("retnet").spec()
    assert [layer.template for layer in es.expand(spec)] == ["retnet_2", "retnet", "retnet_3", "retnet"]


def test_what_the_builder_was_told_does_not_change_behind_its_back() -> None:
    options = {"window": 8}
    builder = es.StackBuilder(32, 2).add("attention", options)
    options["window"] = 9
    assert "window: 8" in es.dump(builder.spec())


def test_mistakes_are_listed_with_the_builders_path() -> None:
    builder = es.StackBuilder(32, 3, hed={}).template("m", "mamba", fnn="mlp").layers("m x", repeet=2)
    with pytest.raises(es.SpecError) as caught:
        builder.spec()
    text = str(caught.value)
    for wrong in ("hed: is not", "layer_templates.m.fnn: is not a key", "layer_schedule.0.repeet: is not a key"):
        assert f"StackBuilder: {wrong}" in text
    assert "did you mean 'ffn'?" in text
    with pytest.raises(ValueError, match=r"layer_templates.m is there already"):
        builder.template("m", "retnet")


def test_a_block_that_is_none_says_nothing() -> None:
    one, other = (es.StackBuilder(d_model=32, n_heads=4, **more).add("retnet") for more in ({}, {"embedding": None}))
    assert one.spec() == other.spec()
