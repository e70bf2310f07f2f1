"""Mixers side by side in the language: what may be written, and what is refused."""

import pytest
import torch

import eulerstack as es

from ..conftest import close

FILE = """
schema_version: 1
model: {name: t, d_model: 32, n_heads: 4, n_kv_heads: 2, vocab_size: 256, max_seq_len: 128}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  h:
    mixer:
      type: branched
      branched:
        branches:
          far: {type: mamba, mamba: {d_state: 8, head_dim: 8}}
          near: {type: attention, attention: {window: 16}}
    ffn: {type: gated_mlp}
layer_schedule: [{template: h, repeat: 2}]
head: {type: causal_lm}
"""
AT = "layer_templates.h.mixer.branched"
WRONG = {
    "far: {type: mamba, mamba: {d_state: 0, head_dim: 8}}": f"{AT}.branches.far.mamba.d_state: 0 is less than 1",
    "far: {type: mamba, mamba: {head_dim: 7}}": f"{AT}.branches.far.mamba.head_dim",
    "far: {type: mamba, mamba: {d_stat: 8}}": f"{AT}.branches.far.mamba.d_stat: is not a key of the language here",
    "far: {type: mumba}": f"{AT}.branches.far.type: 'mumba' is not one of",
    "far: {type: branched}": f"{AT}.branches.far.type: 'branched' is not one of",
    "": f"{AT}.branches: has one entry",
}  # fmt: skip
FAR = "far: {type: mamba, mamba: {d_state: 8, head_dim: 8}}"


@pytest.mark.parametrize("branch", WRONG)
def test_a_wrong_branch_is_named_with_its_line(branch: str) -> None:
    with pytest.raises(es.SpecError) as caught:
        es.loads(FILE.replace(FAR, branch))
    problem = caught.value.problems[0]
    assert WRONG[branch] in f"{problem.key}: {problem.message}"
    assert problem.line is not None


@pytest.mark.parametrize("selector", ["{type: top_k, top_k: 1}", "{type: learned_gate, input: x}"])
def test_what_a_selector_cannot_do_is_refused(selector: str) -> None:
    with pytest.raises(es.SpecError, match="selector"):
        es.loads(FILE.replace("        branches:", f"        selector: {selector}\n        branches:"))


def test_the_gate_is_one_matrix_and_starts_as_the_mean() -> None:
    summed = es.build(es.loads(FILE))
    gated = es.build(es.loads(FILE.replace(" branches:", " selector: {type: learned_gate}\n        branches:", 1)))
    more = sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in summed.parameters())
    assert more == 2 * 2 * 32
    mixer = gated.blocks[0].mixer
    torch.nn.init.zeros_(mixer.gate_proj.weight)
    x = torch.randn(1, 5, 32)
    close(mixer(x), torch.stack([branch(x) for branch in mixer]).mean(0), 1e-6)


def test_a_file_of_branches_is_dumped_and_counted_as_it_is() -> None:
    spec = es.loads(FILE)
    assert es.loads(es.dump(spec)) == spec
    cost = es.estimate(spec)
    model = es.build(spec)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    state = model.init_state(3, 100)
    assert cost.state_bytes(3, 100) == {**state.bytes_by_kind(), "total": state.nbytes()}
    assert set(state.bytes_by_kind()) == {"KV", "SSM", "conv"}
