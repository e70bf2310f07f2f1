"""A tiny corpus and a tiny stack file, and a Trainer that says nothing."""

import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import eulerstack as es
from eulerstack.data.batches import Batches
from eulerstack.data.order import InOrder
from eulerstack.data.rows import Together

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""Options of a Trainer."""

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


@pytest.fixture
def lightnings_own_warnings() -> Iterator[None]:
    """Ignores what Lightning warns of in any small run."""
    with warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*treespec.*", ".*GPU available but not used.*"):
            warnings.filterwarnings("ignore", message=message)
        yield


def in_order(made: es.TextData, split: str) -> Batches:
    """All of a split's batches, from the first."""
    sets = made._sets(split)
    return made._batches(split, Together(sets), InOrder(len(sets[0]), made.batch_size), [Fraction(1)])
