"""`let`, expressions, and what may not stand in them; reserved prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eulerstack as es
from eulerstack.spec import SpecWarning
from eulerstack.spec.let import fill
from eulerstack.spec.yaml import Document

FILE = """
schema_version: 1
let: {d: 64, two: "${1 + 1}", wide: "${let.d * let.two}"}
model: {name: t, d_model: "%s", n_heads: 4, vocab_size: 256, max_seq_len: 512}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates: {a: {mixer: {type: attention}, ffn: {type: none}}}
layer_schedule: [{template: a}]
head: {type: causal_lm}
"""
VALUES = {
    "${let.d}": 64, " ${ let.wide } ": 128, "${let.d / 2}": 32, "${-(-let.d) // 3 * 8}": 168, "${3.2e2}": 320,
    "${(let.wide - let.d) * +2}": 128,
}  # fmt: skip
WRONG = {
    "${let.d / 0}": "divides by zero",
    "${256/0}": "divides by zero",
    "${let.e}": "let.e is not named above it",
    "${let.wid}": "did you mean let.wide?",
    "${}": "is no expression",
    "${1 +}": "is no expression",
    "${2 ** 9}": "`2 ** 9` may not stand in an expression",
    "${d}": "`d` may not stand in an expression",
    "${__import__('os')}": "may not stand in an expression",
    "${let.d.real}": "`let.d.real` may not stand",
    "${True + 63}": "`True` may not stand",
    "${9e99}": "reaches beyond 1e+18",
    "${'64'}": "`'64'` may not stand",
    "${let.d / 3}": "is not a whole number",
    "${((((((((": "is not a whole number",
    "${" + "(" * 150 + "1" + ")" * 40 + "}": "is no expression",
    "${" + "1+" * 200 + "1}": "has more than 200 characters",
}


@pytest.mark.filterwarnings("ignore::eulerstack.spec.SpecWarning")
@pytest.mark.parametrize("text", VALUES)
def test_an_expression_is_its_number(text: str) -> None:
    assert es.loads(FILE % text).model.d_model == VALUES[text]


@pytest.mark.filterwarnings("ignore::eulerstack.spec.SpecWarning")
@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_said_once(text: str) -> None:
    with pytest.raises(es.SpecError) as error:
        es.loads(FILE % text)
    (problem,) = error.value.problems
    assert WRONG[text] in problem.render("x")
    assert (problem.key, problem.line) == ("model.d_model", 4)


@pytest.mark.parametrize(
    ("let", "wanted"),
    [
        ("[1]", "let: is not a mapping"),
        ("{d: big}", "let.d: is not a number"),
        ("{a: '${let.d}', d: 64}", "let.d is not named above it"),
        ("{a b: 3, d: 64}", "'a b' cannot be a name"),
        ("{d: true}", "let.d: is not a number"),
        ("{big: 1e18, more: '${let.big * let.big}', d: 64}", "reaches beyond"),
    ],
)
def test_a_wrong_let(let: str, wanted: str) -> None:
    text = FILE.replace(FILE[FILE.index("{d: 64") : FILE.index("\nmodel")], let) % "64"
    with pytest.raises(es.SpecError, match=wanted):
        es.loads(text)


def test_names_that_nothing_uses_are_a_warning() -> None:
    with pytest.warns(SpecWarning, match="let.wide is in no expression"):
        es.loads(FILE % "${let.d}")


def test_a_stack_is_written_out_without_let() -> None:
    spec = es.loads(FILE % "${let.wide}")
    assert "let" not in es.dump(spec)
    assert es.loads(es.dump(spec)) == spec


@given(st.text(max_size=40))
def test_no_expression_ends_in_a_traceback(text: str) -> None:
    document = Document({"let": {"d": 64}, "value": "${" + text + "}"})
    fill(document)
    assert isinstance(document.data["value"], int | float) or document.problems


@pytest.mark.parametrize("key", ["experimental.x", "future.a.b", "vendor.acme.fast"])
@pytest.mark.parametrize("before", ["{type: learned", "{type: attention", "{template: a"])
def test_reserved_keys_load_with_a_warning(key: str, before: str) -> None:
    text = FILE % "${let.wide}"
    with pytest.warns(SpecWarning, match=f"{key} is reserved for extensions"):
        spec = es.loads(text.replace(before, f"{before}, {key}: {{any: [thing]}}"))
    assert spec == es.loads(text)


def test_a_vendor_has_a_name() -> None:
    with pytest.raises(es.SpecError, match=r"write experimental.KEY, future.KEY or vendor.NAME.KEY"):
        es.loads(FILE.replace("{type: learned", "{type: learned, vendor.acme: 3") % "${let.wide}")
