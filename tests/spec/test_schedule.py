"""Patterns, overrides and shared weights: what a schedule's entries stand for, and what may not be written."""

import pytest
import torch

import eulerstack as es
from eulerstack.spec import expand

from ..conftest import close

FILE = """
schema_version: 1
model: {name: t, d_model: 32, n_heads: 4, vocab_size: 256, max_seq_len: 128, mlp_ratio: 1.0}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  m: {mixer: {type: mamba, mamba: {d_state: 8, head_dim: 8}}, ffn: {type: none}}
  r: {mixer: {type: retnet}, ffn: {type: mlp}}
  a: {mixer: {type: attention}, ffn: {type: gated_mlp}}
layer_schedule: %s
head: {type: causal_lm}
"""
PATTERNS = {
    "[{pattern: m r m a}]": "mrma",
    "[{pattern: m r, repeat: 2}, {template: a, repeat: 3}]": "mrmraaa",
    "[{pattern: [m, r, {template: a, repeat: 2}]}]": "mraa",
    "[{pattern: [{pattern: m r, repeat: 2}, a], repeat: 2}]": "mrmramrmra",
    "[{pattern: [[m, r], a]}]": None,
    "[{pattern: [{pattern: [{pattern: [r, {pattern: a}]}], repeat: 3}, m]}]": "rararam",
}
ONE = "{template: a, override: {%s}}, {pattern: m r}"
WRONG = {
    "[{pattern: m x a}, {pattern: r}]": "layer_schedule.0.pattern: 'x' is not one of layer_templates",
    "[{pattern: [m, {pattern: [r, a, y]}]}]": "layer_schedule.0.pattern.1.pattern.2: 'y' is not one of layer_templates",
    "[{pattern: ''}]": "layer_schedule: names no layer",
    "[{pattern: []}]": "layer_schedule.0.pattern: is empty",
    "[{pattern: [3]}]": "layer_schedule.0.pattern.0: 3 is not a mapping",
    "[{pattern: m, template: r}]": "layer_schedule.0.template: is not a key of the language here",
    "[{pattern: m, repeat: 0}]": "layer_schedule.0.repeat: 0 is less than 1",
    "[{pattern: [{pattern: [{pattern: m, repeat: 4096}], repeat: 4096}], repeat: 4096}]": "68719476736 layers are more",
    "[{repeat: 2}]": "layer_schedule.0.template: is required and missing",
    f"[{ONE % ''}]": "layer_schedule.0.override: changes nothing",
    f"[{ONE % 'attention: {windo: 3}'}]": "override.attention.windo: is not a key of the language here",
    f"[{ONE % 'attention: {window: 0}'}]": "override.attention.window: 0 is less than 1",
    f"[{ONE % 'ffn: {activation: gelu}'}]": "override.ffn.activation: 'gelu' is none of a gated_mlp FFN's activations",
    "[{template: m, override: {attention: {window: 3}}}, {pattern: r a}]": "mixes with mamba, not with attention",
    "[{template: m, override: {ffn: {activation: gelu}}}, {pattern: r a}]": "'gelu' is none of a none FFN's",
    "[{template: a, shared: s}, {pattern: m r}]": "only one layer has 's', so nothing is shared",
    "[{template: a, shared: s}, {template: r, shared: s}, {pattern: m}]": "'s' is shared by layers of different templates",
}  # fmt: skip


def load(schedule: str) -> es.StackSpec:
    return es.loads(FILE % schedule)


@pytest.mark.filterwarnings("ignore::eulerstack.spec.SpecWarning")
@pytest.mark.parametrize("schedule", PATTERNS)
def test_patterns_are_unrolled_in_order(schedule: str) -> None:
    if PATTERNS[schedule] is None:
        with pytest.raises(es.SpecError, match="is not a mapping"):
            load(schedule)
        return
    spec = load(schedule)
    assert "".join(layer.template for layer in expand(spec)) == PATTERNS[schedule]
    assert es.loads(es.dump(spec)) == spec


@pytest.mark.parametrize("schedule", WRONG)
def test_what_may_not_be_written(schedule: str) -> None:
    with pytest.raises(es.SpecError) as error:
        load(schedule)
    assert WRONG[schedule] in str(error.value)
    assert {p.line for p in error.value.problems} == {10}


def test_an_override_is_its_entrys_alone() -> None:
    given = "attention: {window: 8}, norm: {type: layernorm, position: post}, residual: {scaling: 0.5}, "
    spec = load(f"[{{template: a}}, {ONE % (given + 'ffn: {activation: reglu}')}]")
    first, second = expand(spec)[:2]
    assert (first.mixer.window, first.norm.position, first.ffn.activation) == (None, "pre", "swiglu")
    assert (second.mixer.window, second.norm.type, second.norm.position) == (8, "layernorm", "post")
    assert (second.residual.scaling, second.ffn.activation) == (0.5, "reglu")
    assert second.origin == "layer_schedule.1.template"
    assert es.loads(es.dump(spec)) == spec


def test_null_is_a_value_of_an_override() -> None:
    text = (FILE % f"[{{template: a}}, {ONE % 'attention: {window: null}'}]").replace(
        "{type: attention}", "{type: attention, attention: {window: 8}}"
    )
    spec = es.loads(text)
    assert [layer.mixer.window for layer in expand(spec)[:2]] == [8, None]
    assert es.loads(es.dump(spec)) == spec


def test_shared_layers_have_one_set_of_weights_and_each_its_state() -> None:
    apart = load("[{pattern: m r}, {template: a}, {template: m}, {template: a}]")
    shared = load("[{pattern: m r}, {template: a, shared: s}, {template: m}, {template: a, shared: s}]")
    one, two = es.estimate(shared), es.estimate(apart)
    assert [layer.weights_of for layer in expand(shared)] == [0, 1, 2, 3, 2]
    assert one.parameters == two.parameters - two.layers[-1].parameters
    assert one.parameters == sum(cost.parameters for cost in one.layers) + 256 * 32 + 32
    assert one.flops(64) == two.flops(64)
    assert one.state_bytes(1, 64) == two.state_bytes(1, 64)


def test_shared_layers_compute_what_copies_of_their_weights_do() -> None:
    torch.manual_seed(0)
    shared = es.build(load("[{pattern: m r}, {template: a, repeat: 2, shared: s}]"), dtype=torch.float64)
    apart = es.build(load("[{pattern: m r}, {template: a, repeat: 2}]"), dtype=torch.float64)
    weights = shared.state_dict()
    copies = {name.replace("layers.2.", "layers.3."): w for name, w in weights.items() if "layers.2." in name}
    apart.load_state_dict(weights | copies)
    tokens = torch.randint(0, 256, (2, 30))
    close(shared(tokens), apart(tokens), 1e-12)
    _, state = shared.chunkwise(tokens[:, :20], shared.init_state(2, 30))
    close(shared.chunkwise(tokens[:, 20:], state)[0], apart(tokens)[:, 20:], 1e-12)
