"""A tiny corpus and a tiny stack file."""

from pathlib import Path

import pytest

TINY = """
schema_version: 1
model: {name: tiny, d_model: 32, n_heads: 2, vocab_size: 256, max_seq_len: 1024, mlp_ratio: 1.0}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  m: {mixer: {type: mamba, mamba: {d_state: 8, head_dim: 16, chunk_size: 16}}, ffn: {type: gated_mlp}}
  r: {mixer: {type: retnet, retnet: {chunk_size: 16}}, ffn: {type: gated_mlp}}
  a: {mixer: {type: attention}, ffn: {type: gated_mlp}}
layer_schedule: [{template: m}, {template: r}, {template: a}]
head: {type: causal_lm}
"""


@pytest.fixture
def stack_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yml"
    file.write_text(TINY)
    return file


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twenty files of a few hundred bytes, some of them in a folder below, one empty, one hidden."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for i in range(20):
        name = folder / ("more" if i % 3 else ".") / f"{i:02}.txt"
        name.write_text(f"document {i}: " + " ".join(str(i * j) for j in range(60 + 7 * i)) + "\n")
    (folder / "empty.txt").write_text("")
    (folder / ".hidden").write_text("not text of ours")
    return folder
