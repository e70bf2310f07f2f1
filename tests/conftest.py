"""What the tests share: seeds, how Hypothesis draws, small stacks, and comparisons by size or by terms."""

import os
import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

import eulerstack as es
from eulerstack.testing import close, rms_ratio

__all__ = ["FP32", "FP64", "PATIENCE", "build_mini", "close", "close_by_terms", "rms_ratio"]

FP64, FP32 = 1e-12, 1e-5

PATIENCE = 300.0
"""Seconds after which what a test waits for is held to hang, on a machine that has other work as well."""

SEED = int(os.environ.get("EULERSTACK_TEST_SEED", "0"))
"""What the global generators start from in every test; another one draws other inputs for all of them."""

DRAWN: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **DRAWN)
settings.register_profile("fresh", derandomize=False, print_blob=True, **DRAWN)
settings.load_profile("same")


class TorchNumbers:
    """PyTorch's generator, for Hypothesis: each example starts from the same numbers, also when it is repeated."""

    seed = staticmethod(lambda seed: torch.manual_seed(SEED + seed))
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_NUMBERS = TorchNumbers()  # Hypothesis holds it weakly
register_random(TORCH_NUMBERS)


def seed_generators() -> None:
    """Start the global generators from SEED."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@contextmanager
def own_numbers() -> Iterator[None]:
    """Draws from SEED inside, and leaves outside what would have been drawn there."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where tests of the contract make their tensors, as in cuda; the CPU by default")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its options
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device"):
        torch.set_default_device(config.getoption("--device"))
    if config.option.hypothesis_seed is not None:
        config.option.hypothesis_profile = config.option.hypothesis_profile or "fresh"
    elif config.option.hypothesis_profile == "fresh":
        config.option.hypothesis_seed = str(secrets.randbelow(1 << 32))


def pytest_sessionstart(session: pytest.Session) -> None:
    """At the start as well as at the end: a run that is killed is to be repeated too."""
    if seed := session.config.option.hypothesis_seed:
        session.config.get_terminal_writer().line(f"Hypothesis draws from --hypothesis-seed={seed}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if seed := config.option.hypothesis_seed:
        terminalreporter.line(f"Hypothesis drew from --hypothesis-seed={seed}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """What a module draws as it is imported does not depend on the modules before it."""
    with own_numbers():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """What many tests share is drawn alike whichever of them comes first, and takes nothing from its numbers."""
    if fixturedef.scope == "function":
        return (yield)
    with own_numbers():
        return (yield)


@pytest.fixture(autouse=True)
def _the_same_numbers_in_every_run() -> None:
    seed_generators()


def close_by_terms(got: torch.Tensor, wanted: torch.Tensor, terms: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Raises AssertionError unless sums are as exact as their terms are: they may cancel, and a sum of them be small.

    terms: for each sum, the absolute values of its terms added up.
    """
    assert got.shape == wanted.shape == terms.shape
    assert torch.isfinite(got).all()
    error = ((got - wanted).abs() / terms.clamp(min=1e-30)).max().item() if terms.numel() else 0.0
    assert error <= tolerance, f"results differ by {error:.1e} of their terms ({tolerance:.0e} is allowed)"


@pytest.fixture
def build_mini() -> Callable[..., es.Stack]:
    """A tri-mixer stack of a few thousand parameters, its weights scaled up so that the mixers matter."""

    def build(dtype: torch.dtype = torch.float64, scale: float = 2.0, **options: Any) -> es.Stack:
        torch.manual_seed(0)
        builder = es.StackBuilder(d_model=32, n_heads=4, n_kv_heads=2, vocab_size=256, max_seq_len=256, mlp_ratio=1.0)
        builder.add("mamba", {"d_state": 8, "head_dim": 8, "chunk_size": 16})
        builder.add("retnet", {"chunk_size": 16})
        builder.add("attention")
        builder.add("attention", {"window": 7})
        model = builder.build(dtype=dtype, **options)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("proj.weight"):
                    weight.mul_(scale)
        return model

    return build
