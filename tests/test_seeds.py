"""Every run draws the same numbers, in any order of tests, and Hypothesis others when asked, which can be repeated."""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from . import conftest

TESTS = Path(__file__).parent
UNSEEDED = ("Random", "Generator", "default_rng", "RandomState", "PCG64", "SeedSequence")
"""What draws anew in every process unless it is given a seed."""
NEVER_THE_SAME = ("urandom", "SystemRandom", "uuid1", "uuid4", "token_bytes", "token_hex", "randbits", "seed_bytes")
OF_THE_PROFILES = {"derandomize", "deadline", "database", "print_blob"}
"""What tests/conftest.py chooses for all of Hypothesis's tests at once."""


def called(node: ast.Call) -> str:
    """The last name of what a call calls, as in `Random` of random.Random(0)."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def seeded(tree: ast.Module) -> set[ast.expr]:
    """Generators whose seed is set where they are made: torch.Generator("cpu").manual_seed(0)."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and called(node) == "manual_seed")
    return {call.func.value for call in calls if isinstance(call.func, ast.Attribute)}


def unlike(text: str) -> Iterator[str]:
    """Calls that give other values in another run."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, device = called(node), called(node) == "Generator"  # torch.Generator("cpu"): a device, not a seed
        bare = name in UNSEEDED and (device or not node.args) and node not in seeded(tree)
        unordered = name == "parametrize" and any(isinstance(part, ast.Set | ast.SetComp) for part in node.args)
        of_profile = name == "settings" and OF_THE_PROFILES & {word.arg for word in node.keywords}
        if bare or name in NEVER_THE_SAME or unordered or of_profile:
            yield f"line {node.lineno}: {ast.unparse(node)[:80]}"


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_nothing_is_drawn_without_a_seed(file: Path) -> None:
    """The global generators have theirs from conftest.py; each of a test's own is made with one."""
    assert not list(unlike(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("random.Random()", True),
        ("random.Random(3)", False),
        ("torch.Generator('cpu')", True),
        ("torch.Generator().manual_seed(0)", False),
        ("np.random.default_rng()", True),
        ("np.random.default_rng((5, 0))", False),
        ("os.urandom(4)", True),
        ("mark.parametrize('name', {'a', 'b'})", True),
        ("mark.parametrize('name', ['a', 'b'])", False),
        ("settings(max_examples=5, derandomize=True)", True),
        ("settings(max_examples=5)", False),
    ],
)
def test_what_counts_as_drawn_without_a_seed(text: str, told: bool) -> None:
    assert bool(list(unlike(text))) is told


def test_each_test_begins_with_the_numbers_of_the_seed() -> None:
    found = random.random(), np.random.rand(), torch.rand(1).item()
    conftest.seed_generators()
    assert found == (random.random(), np.random.rand(), torch.rand(1).item())


def test_sums_that_cancel_are_held_to_their_terms() -> None:
    """600 numbers whose sum is next to nothing, as a bias's gradient may be: one draw in 200 is like these."""
    terms = torch.randn(600, generator=torch.Generator().manual_seed(66))
    got, wanted, size = terms.sum(), terms.double().sum(), terms.double().abs().sum()
    with pytest.raises(AssertionError, match="of the largest"):
        conftest.close(got.double(), wanted, 1e-5)
    conftest.close_by_terms(got.double(), wanted, size)
    with pytest.raises(AssertionError, match="of their terms"):
        conftest.close_by_terms(got.double() + 0.01 * terms.double().abs().max(), wanted, size)


SAMPLE = """
import os, random
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st

def numbers():
    return [random.random(), float(np.random.rand()), torch.rand(1).item()]

AT_IMPORT = numbers()

@pytest.fixture(scope="module")
def shared():
    return numbers()

def tell(name, *values):
    with open(os.environ["TOLD"], "a") as file:
        print(NAME, name, *values, file=file)

def test_first(shared):
    tell("first", AT_IMPORT, shared, numbers())

def test_second(shared):
    tell("second", shared, numbers())

@settings(max_examples=8)
@given(st.integers(0, 10**9))
def test_drawn(number):
    tell("drawn", number, torch.rand(1).item())
"""
REVERSED = "def pytest_collection_modifyitems(items): items.reverse()"
RUNS = {
    "same": [],
    "one file, reversed": ["test_b.py", "-p", "reversed_order"],
    "fresh": ["--hypothesis-profile=fresh"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], str]]:
    """What two files of tests drew under each of RUNS and once more from the seed of "fresh", and what the run said."""
    root = tmp_path_factory.mktemp("seeds")
    shutil.copy(TESTS / "conftest.py", root)
    (root / "reversed_order.py").write_text(REVERSED)
    for name in ("test_a", "test_b"):
        (root / f"{name}.py").write_text(f"NAME = {name!r}\n{SAMPLE}")
    found = done({name: started_in(root, i, words) for i, (name, words) in enumerate(RUNS.items())})
    seed = re.findall(r"--hypothesis-seed=\d+", found["fresh"][1])
    assert len(seed) == 2 and seed[0] == seed[1]  # at the start and at the end
    return found | done({"repeated": started_in(root, len(RUNS), [seed[0], "-p", "reversed_order"])})


def done(started: dict[str, tuple["subprocess.Popen[str]", Path]]) -> dict[str, tuple[list[str], str]]:
    """What each run drew, in an order of its own, and what it said."""
    said = {name: run.communicate(timeout=600)[0] for name, (run, _) in started.items()}
    assert all(run.returncode == 0 for run, _ in started.values()), said
    return {name: (sorted(told.read_text().splitlines()), said[name]) for name, (_, told) in started.items()}


def started_in(root: Path, number: int, words: list[str]) -> tuple["subprocess.Popen[str]", Path]:
    """A run, with names hashed in its own way, and the file in which its tests write what they draw."""
    told = root / str(number)
    path = os.pathsep.join([str(root), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TOLD": str(told), "PYTHONHASHSEED": str(number), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True), told


def by_hypothesis(lines: list[str]) -> list[str]:
    return [line for line in lines if " drawn " in line]


def test_runs_draw_the_same_in_any_order_and_from_any_files(runs: dict[str, tuple[list[str], str]]) -> None:
    same, said = runs["same"]
    assert len(same) == 2 * (2 + 8) and "--hypothesis-seed" not in said
    assert runs["one file, reversed"][0] == [line for line in same if line.startswith("test_b")]


def test_fresh_draws_are_others_and_their_seed_repeats_them(runs: dict[str, tuple[list[str], str]]) -> None:
    same, fresh = runs["same"][0], runs["fresh"][0]
    assert by_hypothesis(fresh) != by_hypothesis(same)
    assert [line for line in fresh if " drawn " not in line] == [line for line in same if " drawn " not in line]
    assert runs["repeated"][0] == fresh


def test_make_chooses() -> None:
    """`make test`, which CI runs, draws the same every time; `make test-full` draws afresh."""
    lines = (TESTS.parent / "Makefile").read_text(encoding="utf-8").splitlines()
    quick, whole = (lines[lines.index(f"{goal}: $(READY)") + 1] for goal in ("test", "test-full"))
    assert "hypothesis" not in quick and "--hypothesis-profile=fresh" in whole
