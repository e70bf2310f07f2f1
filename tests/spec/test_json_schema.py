"""The schema that editors read: equal to the models, described to the last key, and as lenient as the loader."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import eulerstack as es
from eulerstack.spec import schema
from eulerstack.spec.yaml import parse

SCHEMA = json.loads(schema())
FILE = """
schema_version: 1
let: {d: 64, wide: "${let.d * 2}"}
model: {name: t, d_model: "${let.wide}", n_heads: 4, vocab_size: 256, max_seq_len: 512, experimental.x: 1}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  a: {mixer: {type: attention, attention: {window: "${let.d}"}}, ffn: {type: none}}
layer_schedule: [{template: a}, {pattern: a a}, {pattern: [a, {template: a, repeat: 2}]}]
head: {type: causal_lm}
vendor.me.y: 3
"""


def keys() -> Iterator[tuple[str, Any]]:
    for block, node in {"StackSpec": SCHEMA, **SCHEMA["$defs"]}.items():
        assert node.get("description"), f"{block} has no docstring"
        for name, key in node.get("properties", {}).items():
            yield f"{block}.{name}", key


def check(text: str) -> None:
    jsonschema.validate(json.loads(json.dumps(parse(text, "file").data)), SCHEMA)


def test_the_schema_on_disk_is_the_models() -> None:
    file = Path(__file__).parents[2] / "schemas" / "eulerstack-v1.json"
    assert file.read_text() == schema()


def test_every_key_is_described_unless_it_is_a_tag_or_a_block() -> None:
    assert [name for name, key in keys() if not key.keys() & {"description", "const", "$ref"}] == []


@pytest.mark.parametrize("name", sorted(es.presets()))
def test_shipped_files_are_right_in_an_editor(name: str) -> None:
    text = es.presets()[name].read_text()
    check(text)


@pytest.mark.filterwarnings("ignore::eulerstack.spec.SpecWarning")
def test_the_editor_allows_what_the_loader_allows() -> None:
    es.loads(FILE)
    check(FILE)


@pytest.mark.parametrize(
    ("good", "bad"), [("n_heads: 4", 'n_heads: "4"'), ("repeat: 2", "repeat: 0"), ("d: 64", "d: x")]
)
def test_the_editor_marks_what_the_loader_refuses(good: str, bad: str) -> None:
    with pytest.raises(es.SpecError):
        es.loads(FILE.replace(good, bad))
    with pytest.raises(jsonschema.ValidationError):
        check(FILE.replace(good, bad))
