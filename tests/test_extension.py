"""Mixers that other packages bring: examples/min_gru by its entry point, and what may go wrong with one."""

import copy
import os
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import pytest
from pydantic import Field

import eulerstack as es
from eulerstack.mixers import Retention
from eulerstack.spec import LayerTemplate, Problem, extensions, schema

EXAMPLE = Path(__file__).parents[1] / "examples" / "min_gru"
FILE = """
schema_version: 1
model: {name: t, d_model: 32, n_heads: 4, vocab_size: 256, max_seq_len: 64}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  x: {mixer: %s, ffn: {type: none}}
layer_schedule: [{template: x}]
head: {type: causal_lm}
"""


class OwnSpec(es.ExtensionSpec):
    """Retention by another name."""

    MIXER: ClassVar = "tests.test_extension:Own"
    heads: Annotated[int, Field(ge=1, le=64)] = 4

    def problems(self, stack: es.StackSpec) -> Iterator[Problem]:
        if stack.model.d_model % self.heads:
            yield Problem("heads", f"{self.heads} does not divide d_model", "choose a divisor")


class Own(Retention):
    def __init__(self, spec: OwnSpec, stack: es.StackSpec, target: Any) -> None:
        super().__init__(es.spec.RetNetSpec(), stack, target)


class NeedsSpec(OwnSpec):
    rate: float


class NoMixerSpec(es.ExtensionSpec):
    pass


class LostSpec(es.ExtensionSpec):
    MIXER: ClassVar = "tests.test_extension:Lost"


class WrongSpec(es.ExtensionSpec):
    MIXER: ClassVar = OwnSpec


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_known", {})


def stack(mixer: str) -> es.StackSpec:
    return es.loads(FILE % mixer, "file.yml")


def install(folder: Path, package: str, **points: str) -> Path:
    """What pip leaves of a package's metadata."""
    info = folder / f"{package}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = [f"[{extensions.GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_an_installed_mixer_is_used_like_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name alone: validated without torch, estimated, explained, trained, saved, and asked for text."""
    points = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"][extensions.GROUP]
    site, file = install(tmp_path / "site", "min-gru", **points), str(EXAMPLE / "min_gru_mini.yml")
    paths = [str(site), str(EXAMPLE), *sys.path]
    code = f"""if True:
        import sys; sys.path[:] = {paths!r}
        from eulerstack.cli.main import cli
        def say(*words):
            print("$", *words, flush=True); cli(words, standalone_mode=False)
        say("validate", {file!r})
        assert "torch" not in sys.modules
        say("schema", "--extensions")
        say("explain", {file!r})
        say("estimate", {file!r}, "--tokens", "100")
        say("fit", "--preset", {file!r}, "--trainer.max_steps", "2", "--data.seq_len", "32", "--data.batch_size", "2",
            "--trainer.limit_val_batches", "1", "--trainer.default_root_dir", "run")
        say("generate", "--checkpoint", "run/checkpoint", "--prompt", "def ", "--max-new-tokens", "3")
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    for said in ('"min_gru"', "min_gru: expand 2, chunk_size 64", "state bytes, hidden", "hidden 512 B", "\ndef "):
        assert said in done.stdout, said
    monkeypatch.setattr(extensions, "_entries", lambda path: ())  # here it is not installed
    with pytest.raises(es.SpecError, match="'min_gru' is not one of") as caught:
        es.load(tmp_path / "run" / "checkpoint")
    assert "install min-gru 1.2: this checkpoint was made with it" in str(caught.value)


def test_a_registered_mixer_is_used_like_our_own() -> None:
    es.register("own", OwnSpec)
    spec = stack("{type: own, own: {heads: 8}}")
    assert es.loads(es.dump(spec)) == spec == stack("{type: own, own: {heads: 8}}")
    assert spec != stack("{type: own}")
    assert es.StackBuilder(32, 4).add("own", {"heads": 8}).spec().layer_templates["own"] != spec.layer_templates["x"]
    twin = es.estimate(stack("{type: retnet}"))
    assert es.estimate(spec).parameters == twin.parameters
    assert es.estimate(spec).state_bytes(1, 9) == twin.state_bytes(1, 9)
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert spec.extensions == {"own": "import tests.test_extension, which registers it"}


def test_it_may_stand_beside_others_in_a_layer() -> None:
    es.register("own", OwnSpec)
    branches = "branches: {a: {type: own, own: {heads: 2}}, b: {type: attention}}"
    spec = stack(f"{{type: branched, branched: {{{branches}}}}}")
    assert es.loads(es.dump(spec)) == spec
    assert set(es.estimate(spec).state_bytes(1, 4)) == {"retention", "KV", "total"}
    with pytest.raises(es.SpecError, match=r"mixer.branched.branches.a.own.heads: 3 does not divide"):
        stack(f"{{type: branched, branched: {{{branches.replace('2', '3')}}}}}")


@pytest.mark.parametrize("kept", ["kv_cache", "ssm_state"])
def test_either_word_says_what_it_keeps(kept: str) -> None:
    es.register("own", OwnSpec)
    model = es.StackBuilder(32, 4).add("own", state={kept: False}).build()
    with pytest.raises(ValueError, match="keeps no state"):
        model.init_state(1)


WRONG = {
    "{type: ovn}": "layer_templates.x.mixer.type: 'ovn' is not one of .*, own\nFix: did you mean 'own'?",
    "{type: own, own: {head: 2}}": "layer_templates.x.mixer.own.head: is not a key .*\nFix: did you mean 'heads'?",
    "{type: own, own: {heads: 0}}": "layer_templates.x.mixer.own.heads: 0 is less than 1",
    '{type: own, own: {heads: "2"}}': "layer_templates.x.mixer.own.heads: '2' is not a whole number",
    "{type: own, own: {heads: 5}}": "layer_templates.x.mixer.own.heads: 5 does not divide d_model\nFix: choose",
    "{type: own, own: 3}": "layer_templates.x.mixer.own: 3 is not a mapping",
    "{type: own, onw: {}}": "layer_templates.x.mixer.onw: is not a key .*\nFix: did you mean 'own'?",
    "{type: needs}": "layer_templates.x.mixer.needs: is required and missing",
    "{type: needs, needs: {}}": "layer_templates.x.mixer.needs.rate: is required and missing",
    "{type: [own]}": "layer_templates.x.mixer.type: ",
}


@pytest.mark.parametrize("mixer", WRONG)
def test_mistakes_are_found_as_in_our_own(mixer: str) -> None:
    es.register("own", OwnSpec)
    es.register("needs", NeedsSpec)
    with pytest.raises(es.SpecError, match=r"file.yml:7:\d+: " + WRONG[mixer]) as caught:
        stack(mixer)
    assert len(caught.value.problems) == 1


REFUSED: dict[tuple[str, type], str] = {
    ("attention", OwnSpec): "'attention' is a mixer of the language's own",
    ("Own", OwnSpec): "'Own' cannot be the name",
    ("type", OwnSpec): "'type' cannot be the name",
    ("model_dump", OwnSpec): "'model_dump' cannot be the name",
    ("own", Own): "no subclass of eulerstack.spec.ExtensionSpec",
    ("own", NoMixerSpec): "NoMixerSpec names no mixer",
}


@pytest.mark.parametrize(("name", "spec"), REFUSED)
def test_what_cannot_be_registered_is_refused(name: str, spec: type) -> None:
    with pytest.raises(ValueError, match=REFUSED[name, spec]):
        es.register(name, spec)


def test_a_spec_whose_mixer_is_none_validates_and_does_not_build() -> None:
    for spec, wrong in ((LostSpec, "tests.test_extension:Lost' does not load: AttributeError"), (WrongSpec, "OwnSpec")):
        es.register("own", spec)
        file = stack("{type: own}")
        with pytest.raises(ValueError, match=wrong):
            es.build(file)


def test_a_broken_package_breaks_nobody_elses_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "broken", broken="no_such_module:Spec", attention="tests.test_extension:OwnSpec")
    install(tmp_path, "sound", own="tests.test_extension:OwnSpec", two="tests.test_extension:OwnSpec")
    install(tmp_path, "rival", two="tests.test_extension:LostSpec")
    monkeypatch.syspath_prepend(tmp_path)
    stack("{type: attention}")
    assert extensions.known() == {}
    stack("{type: own}")
    assert list(extensions.known()) == ["own"]
    wrong = "'broken' of broken 1.2 does not load: ModuleNotFoundError: No module named 'no_such_module'"
    with pytest.raises(es.SpecError, match=rf"file.yml:7:\d+: layer_templates.x.mixer: the mixer {wrong}"):
        stack("{type: broken}")
    with pytest.raises(es.SpecError, match=r"more than one package brings 'two': \w+ 1.2 and \w+ 1.2"):
        stack("{type: two}")
    with pytest.warns(es.spec.SpecWarning) as said:
        assert '"own"' in schema(extensions=True)
    assert [str(w.message).partition("'")[0] for w in said] == [
        "the mixer ",
        "the mixer ",
        "more than one package brings ",
    ]


def test_the_schema_is_the_bare_languages_unless_asked() -> None:
    bare = schema()
    es.register("own", OwnSpec)
    assert schema() == bare
    assert schema(extensions=True).count('"#/$defs/own"') == 4  # a mixer, a branch; and in both, the discriminator


def test_our_own_names_are_known_to_be_ours() -> None:
    hint = get_type_hints(LayerTemplate)["mixer"]
    assert sorted(get_args(block.model_fields["type"].annotation)[0] for block in get_args(hint)) == list(
        extensions.OWN
    )
