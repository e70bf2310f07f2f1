"""What the v1 language has and this one refuses: by name, with what to write instead, where its files have it."""

import pytest

import eulerstack as es
from eulerstack.spec import refused

FILE = """
schema_version: 1
model: {name: t, d_model: 32, n_heads: 4, vocab_size: 256, max_seq_len: 128%s}
tokenizer_contract: {type: byte%s}
embedding: {type: learned%s}
layer_templates:
  a: {mixer: {type: attention, attention: {%s}}, ffn: {type: gated_mlp}}
  b: {mixer: {type: retnet}, ffn: {type: moe, moe: {experts: 2, top_k: 1%s}}%s}
layer_schedule: [{template: a}, {template: b%s}%s]
head: {type: causal_lm%s}
%s
"""
ROOT, MODEL, TOKENIZER, EMBEDDING, ATTENTION, MOE, TEMPLATE, ENTRY, ENTRIES, HEAD = -1, 0, 1, 2, 3, 4, 5, 6, 7, 8
STREAMS = "[{stream: x, body: [{template: a}]}, {stream: y, body: [{template: b}]}]"
KEYS = {
    "capacity_factor": (MOE, ", capacity_factor: 1.25"),
    "compatibility": (ROOT, "compatibility: {compile_target: inductor, dtype_policy: uniform}"),
    "compression": (ATTENTION, "compression: {type: csa}"),
    "depth_gating": (ENTRY, ", depth_gating: {enabled: true, capacity: 0.5}"),
    "execution_modes": (ROOT, "execution_modes: [{name: think}]"),
    "hyper": (TEMPLATE, ", residual: {type: sequential, hyper: {expand: 4}}"),
    "integrator": (ENTRIES, ", {integrator: {type: ode_rk4, steps: 4, body: [{template: a}]}}"),
    "memory": (TEMPLATE, ", memory: {type: neural_memory}"),
    "merge": (ENTRIES, ", {parallel: " + STREAMS + ", merge: {type: add}}"),
    "pad_token": (TOKENIZER, ", pad_token: <pad>"),
    "parallel": (ENTRIES, ", {parallel: " + STREAMS + ", merge: {type: add}}"),
    "shape_change": (TEMPLATE, ", shape_change: {to: 64}"),
    "transition": (ROOT, "transition: {from: a}"),
    "ttt": (TEMPLATE, ", residual: {type: sequential}, ttt: {inner_lr: 0.1}"),
    "window_dilation": (ATTENTION, "window: 8, window_dilation: 2"),
}
VALUES = {
    "dilated": (ATTENTION, "window: 8, window_mode: dilated"),
    "nsa": (ATTENTION, "window: 8, window_mode: nsa"),
    "dynamic": (EMBEDDING, ", rope_scaling: {type: dynamic, factor: 2}"),
    "hyper_connection": (TEMPLATE, ", residual: {type: hyper_connection}"),
}


def problems(place: int, text: str) -> list[str]:
    holes = [""] * 10
    holes[place] = text
    with pytest.raises(es.SpecError) as caught:
        es.loads(FILE % tuple(holes))
    assert all(problem.line for problem in caught.value.problems)
    return [f"{p.key}: {p.message} / {p.fix}" for p in caught.value.problems]


@pytest.mark.parametrize("key", refused.KEYS)
def test_a_key_is_refused_by_name_with_what_to_write_instead(key: str) -> None:
    why, fix = refused.KEYS[key]
    assert any(f"{key}: {why} / {fix}" in text for text in problems(*KEYS[key]))


@pytest.mark.parametrize("value", VALUES)
def test_a_word_is_refused_by_name_with_what_is_allowed(value: str) -> None:
    assert any(f"'{value}' {refused.VALUES[value]} / use one of" in text for text in problems(*VALUES[value]))


@pytest.mark.parametrize("kind", ["ttt_layer", "h3"])
def test_a_mixer_is_refused_by_name(kind: str) -> None:
    with pytest.raises(es.SpecError, match=f"'{kind}' {refused.VALUES[kind]}"):
        es.loads((FILE % tuple([""] * 10)).replace("type: retnet", f"type: {kind}"))
