"""docs/reference.md: equal to the language, and its examples load."""

import re
from pathlib import Path

import pytest

import eulerstack as es
from tools.reference import page

PAGE = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()
MODEL = "model: {name: t, d_model: 64, n_heads: 4, vocab_size: 256, max_seq_len: 512}"
REST = """
schema_version: 1
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  a: {mixer: {type: attention}, ffn: {type: gated_mlp}}
  m: {mixer: {type: mamba}, ffn: {type: gated_mlp}}
  r: {mixer: {type: retnet}, ffn: {type: gated_mlp}}
head: {type: causal_lm}
"""


def test_the_page_on_disk_is_the_languages() -> None:
    assert page() == PAGE, "run `make docs`"


def test_every_key_of_every_block_is_on_the_page() -> None:
    sections = dict(re.findall(r'^## <a id="(\w+)"></a>(.*?)(?=^## |\Z)', PAGE, re.M | re.S))
    models = es.StackSpec.model_json_schema()
    for name, block in {"file": models, **models["$defs"]}.items():
        assert [key for key in block["properties"] if f"| `{key}` |" not in sections[name.lower()]] == [], name


def test_every_link_within_the_page_leads_somewhere() -> None:
    anchors = re.findall(r'<a id="(\w+)">', PAGE)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#(\w+)\)", PAGE)) <= set(anchors)


@pytest.mark.filterwarnings("ignore:.*is in no entry of layer_schedule:eulerstack.spec.SpecWarning")
@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", PAGE, re.S))
def test_the_examples_of_the_page_load(example: str) -> None:
    model = "" if "model:" in example else MODEL
    schedule = "" if "layer_schedule:" in example else "layer_schedule: [{template: a}]"
    assert es.expand(es.loads("\n".join([example, model, REST, schedule])))
