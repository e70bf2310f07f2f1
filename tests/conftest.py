"""What the tests share: small stacks, drawn states, and comparisons relative to the largest value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import eulerstack as es
from eulerstack.testing import close, rms_ratio

__all__ = ["FP32", "FP64", "build_mini", "close", "rms_ratio"]

FP64, FP32 = 1e-12, 1e-5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where tests of the contract make their tensors, as in cuda; the CPU by default")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device"):
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(autouse=True)
def _the_same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


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
