"""Files with many mistakes of different kinds: one report names them all, each with its line."""

import re
from pathlib import Path

import pytest

import eulerstack as es
from eulerstack.spec.errors import CATEGORIES

DOCS = Path(__file__).parents[2] / "docs" / "errors.md"

# Mistakes are marked in their lines: `#! CATEGORY key; CATEGORY key`; what is missing, in the line of its block.
FILES = {
    "widths": """
schema_version: 1
model:  #! Missing key model.vocab_size
  name: planted
  d_model: "256"  #! Type model.d_model
  n_heads: 6
  n_kv_heads: 4  #! Compatibility model.n_kv_heads
  max_seq_length: 4096  #! Unknown key model.max_seq_length
  mlp_ratio: -1  #! Range model.mlp_ratio
  dtype: bflot16  #! Choice model.dtype
tokenizer_contract: {type: byte}
embedding: {type: learned, rope_scalling: {type: ntk}}  #! Unknown key embedding.rope_scalling; Missing key embedding.rope_scaling.factor
layer_templates:
  m: {mixer: {type: mamba}, ffn: {type: mlp}, norm: rmsnorm}  #! Type layer_templates.m.norm
layer_schedule:
  - {template: m, repeat: 0}  #! Range layer_schedule.0.repeat
  - {template: n}  #! Compatibility layer_schedule.1.template
head: {type: causal_lm, tie_weights: false}  #! Compatibility head.tie_weights
training_hints: {lr_peak: 3e99, betas: [0.9, 1]}  #! Range training_hints.betas.1; Range training_hints.lr_peak
""",
    "templates": """
schema_version: 1
model: {name: planted, d_model: 96, n_heads: 4, vocab_size: 256, max_seq_len: 64}
tokenizer_contract: {type: byte}
embedding: {type: learned, positional: none, rope_theta: 100}
layer_templates:
  r:
    mixer:
      type: retent  #! Choice layer_templates.r.mixer.type
      retnet:
        chunk_sze: 16  #! Unknown key layer_templates.r.mixer.retnet.chunk_sze
        gamma: eq9  #! Choice layer_templates.r.mixer.retnet.gamma
        value_expand: 0.26  #! Compatibility layer_templates.r.mixer.retnet.value_expand
    ffn: {type: gated_mlp}
    state:
      ssm_state: true  #! Compatibility layer_templates.r.state.ssm_state
  a:
    mixer:
      type: attention
      attention:
        latent_dim: 128  #! Compatibility layer_templates.a.mixer.attention.latent_dim
        rope_head_dim: 8  #! Compatibility layer_templates.a.mixer.attention.rope_head_dim
        window_mode: sliding  #! Compatibility layer_templates.a.mixer.attention.window_mode
        zzz: 5  #! Unknown key layer_templates.a.mixer.attention.zzz
    ffn:
      type: moe
      activation: swigelu  #! Choice layer_templates.a.ffn.activation
      moe:
        experts: 2
        top_k: 3  #! Compatibility layer_templates.a.ffn.moe.top_k
        capacity_factor: 1.2  #! Unsupported layer_templates.a.ffn.moe.capacity_factor
    norm:
      position: before  #! Choice layer_templates.a.norm.position
    residual:
      scaling: none  #! Type layer_templates.a.residual.scaling
  m:
    mixer:
      type: mamba
      mamba:
        variant: mamba2
        head_dim: 60  #! Compatibility layer_templates.m.mixer.mamba.head_dim
        dt_rank: 3  #! Unknown key layer_templates.m.mixer.mamba.dt_rank
    ffn: {type: none, bias: true}  #! Unknown key layer_templates.m.ffn.bias
layer_schedule:
  - pattern: r a q m  #! Compatibility layer_schedule.0.pattern
  - template: r
    override:
      attention: {window: 4}  #! Compatibility layer_schedule.1.override.attention
  - template: a
    overide: {norm: {type: layernorm}}  #! Unknown key layer_schedule.2.overide
head: {type: causal_lm}
""",
    "texts": """
schema_version: 2  #! Range schema_version
let:
  width: 64
  hedas: ${let.width / 0}  #! Expression let.hedas
model:
  name: a/b  #! Range model.name
  d_model: ${let.widht * 2}  #! Expression model.d_model
  n_heads: ${let.hedas}
  vocab_size: 256
  vocab_size: 512  #! Duplicate key model.vocab_size
  max_seq_len: true  #! Type model.max_seq_len
tokenizer_contract: {type: hf}  #! Missing key tokenizer_contract.pretrained
embedding: {type: learned, rope_scaling: {type: yarn}}  #! Missing key embedding.rope_scaling.factor
layer_templates:
  b:
    mixer:
      type: branched
      branched:
        branches:
          one: {type: attention}
          two: {type: mamba, mamba: {d_stat: 16}}  #! Unknown key layer_templates.b.mixer.branched.branches.two.mamba.d_stat
        selector: {type: lerned_gate}  #! Choice layer_templates.b.mixer.branched.selector.type
    ffn: {type: mlp}
  t:
    mixer: {type: ttt_layer}  #! Unsupported layer_templates.t.mixer.type
    ffn: [gated_mlp]  #! Type layer_templates.t.ffn
    norm: *nothing  #! YAML layer_templates.t.norm
  3:  #! YAML layer_templates.3
    ffn: !mine {type: mlp}  #! YAML layer_templates.3.ffn
    mixer: {retnet: {rope: "yes"}}  #! Type layer_templates.3.mixer.retnet.rope; Missing key layer_templates.3.mixer.type
    <<: {}  #! YAML layer_templates.3.<<
layer_schedule:
  - {template: b, shared: s}  #! Compatibility layer_schedule.0.shared
  - 5  #! Type layer_schedule.1
  - {template: tt}  #! Compatibility layer_schedule.2.template
  - {repeat: 2}  #! Missing key layer_schedule.3.template
head:
  type: causal_lm_mtp
  mtp: {n_predict: 0, head_template: bb}  #! Compatibility head.mtp.head_template; Range head.mtp.n_predict
training_hints: {seed: -1}  #! Range training_hints.seed
""",
}  # fmt: skip


def marked(text: str) -> set[tuple[int, str, str]]:
    """(line, category, key) of each mark."""
    found = set()
    for number, line in enumerate(text.splitlines(), 1):
        for mark in filter(None, line.partition("#! ")[2].split("; ")):
            category, _, key = mark.rpartition(" ")
            found.add((number, category, key))
    return found


@pytest.mark.parametrize("name", FILES)
def test_one_report_names_every_mistake_with_its_line(name: str) -> None:
    with pytest.raises(es.SpecError) as caught:
        es.loads(FILES[name], "planted.yml")
    found = {(p.line, p.category, p.key) for p in caught.value.problems}
    assert found == marked(FILES[name])


def test_every_problem_has_three_lines_and_its_columns() -> None:
    with pytest.raises(es.SpecError) as caught:
        es.loads(FILES["widths"], "planted.yml")
    for problem in caught.value.problems:
        what, fix, see = problem.render("planted.yml").split("\n")
        assert what.startswith(f"{problem.category}: planted.yml:{problem.line}:{problem.column}: {problem.key}: ")
        assert fix.startswith("Fix: ")
        assert see == f"See: {problem.see}"


def test_every_category_has_a_section_in_the_docs_and_no_other() -> None:
    sections = re.findall(r"^## (.*)$", DOCS.read_text(), re.MULTILINE)
    assert sections == list(CATEGORIES)
    for part in re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)[1:]:
        assert re.search(rf"```\n{part.splitlines()[0]}: .*\nFix: ", part), "a section shows an example and its cure"


def test_a_problem_says_what_is_allowed() -> None:
    with pytest.raises(es.SpecError) as caught:
        es.loads(FILES["templates"])
    found = {p.key: p for p in caught.value.problems}
    gamma = found["layer_templates.r.mixer.retnet.gamma"]
    assert (gamma.value, gamma.allowed) == ("eq9", ["eq8", "paper_runs", "learned", "gated"])
    assert found["layer_templates.r.mixer.retnet.chunk_sze"].near == "chunk_size"
    assert found["layer_templates.r.mixer.type"].near == "retnet"
    assert found["layer_templates.a.residual.scaling"].allowed == "a number above 0 up to 1000"
