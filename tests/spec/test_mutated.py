"""Thousands of presets with random mistakes: a sentence or a spec, at once, and what is valid can be built."""

import json
import subprocess
import sys
import warnings

import pytest

import eulerstack as es
from eulerstack.spec import SpecWarning
from tests.spec.mutator import mutated

FULL = pytest.param(1_000, 10_000, 200, marks=pytest.mark.slow)


@pytest.mark.parametrize(("first", "count", "built"), [(0, 300, 8), FULL])
def test_mutated_presets_are_refused_in_a_sentence_or_can_be_built(first: int, count: int, built: int) -> None:
    command = [sys.executable, "-m", "tests.spec.mutator", str(first), str(count)]
    came = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert not came["wrong"]
    assert came["longest"][0] < 1, came["longest"]
    assert came["peak"] < 500e6
    small = [spec for spec in map(_loaded, came["valid"]) if len(es.expand(spec)) <= 64]
    assert len(small) >= built
    for spec in small[:built]:
        _agrees_with_its_estimate(spec)


def _loaded(seed: int) -> es.StackSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        return es.loads(mutated(seed))


def _agrees_with_its_estimate(spec: es.StackSpec) -> None:
    """Parameters, and bytes of a state of 16 tokens, as the model built on meta has them."""
    counted, model = es.estimate(spec), es.build(spec, device="meta")
    assert counted.parameters == sum(weight.numel() for weight in model.parameters())
    tokens = min(16, spec.model.max_seq_len)
    if all(layer.state.kept for layer in es.expand(spec)):
        assert counted.state_bytes(2, tokens)["total"] == model.init_state(2, tokens).nbytes()
