"""Steps by our Triton kernels against PyTorch's, on a GPU or through Triton's interpreter (`make test-triton`)."""

import os
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from eulerstack.kernels.attention import Logits
from eulerstack.kernels.attention import torch as attention
from eulerstack.kernels.provider import Target
from eulerstack.kernels.retention import torch as retention
from eulerstack.kernels.select import select

from ..conftest import rms_ratio
from .test_selective_scan import placements

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
SIZES = [(2, 4, 16, 32), (3, 3, 40, 100), (1, 1, 3, 5), (2, 2, 256, 512)]
if DEVICE == "cpu":
    del SIZES[-1]  # the interpreter takes minutes
    del BOUNDS[torch.bfloat16]  # the interpreter's products of it are wrong

pytestmark = pytest.mark.gpu

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad(), np.errstate(divide="ignore"):
        yield


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("G", "H", "K", "V"), SIZES)
@pytest.mark.parametrize("where", placements(11))
@pytest.mark.parametrize("gated", [False, True])
def test_a_step_of_retention(where: str, gated: bool, G: int, H: int, K: int, V: int, dtype: torch.dtype) -> None:
    segments = placements(11, DEVICE)[where].slice(3, 4)
    q, k, v = (torch.randn(3, 1, h, n, device=DEVICE).to(dtype) for h, n in ((G, K), (G, K), (H, V)))
    decay = -torch.rand(*(3, 1)[: 2 * gated], H, device=DEVICE)
    state = torch.randn(3, H, K, V, device=DEVICE)
    wanted = retention.recurrent(q.double(), k.double(), v.double(), decay, state.double(), segments)
    y, after = select("retention", Target("triton", DEVICE, dtype)).kernels.recurrent(q, k, v, decay, state, segments)
    assert after is state
    assert rms_ratio(y, wanted[0]) < BOUNDS[dtype]
    assert rms_ratio(after, wanted[1]) < BOUNDS[dtype]


def test_a_step_of_retention_with_gradients_leaves_the_state_alone() -> None:
    q, k, v, state = (torch.randn(s, device=DEVICE) for s in [(1, 1, 1, 4)] * 3 + [(1, 1, 4, 4)])
    decay, segments, before = -torch.rand(1, device=DEVICE), placements(11, DEVICE)["plain"].slice(3, 4), state.clone()
    with torch.enable_grad():
        ops = select("retention", Target("triton", DEVICE)).kernels
        y, _ = ops.recurrent(q.requires_grad_(), k, v, decay, state, segments)
    assert y.requires_grad
    assert torch.equal(state, before)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("B", "S", "G", "H", "K", "V"),
    [
        (3, 700, 2, 4, 16, 32),
        (2, 33, 2, 6, 40, 24),
        (1, 1, 1, 1, 8, 8),
        (2, 300, 1, 20, 16, 16),
        (1, 1100, 1, 1, 128, 128),
    ],
)
def test_a_step_of_attention(B: int, S: int, G: int, H: int, K: int, V: int, dtype: torch.dtype) -> None:
    """Of caches that are cut, as rings longer than what is read are, with holes, and a row that sees nothing."""
    q = torch.randn(B, 1, H, K, device=DEVICE).to(dtype)
    k, v = (torch.randn(B, S + 5, G, n, device=DEVICE).to(dtype)[:, :S] for n in (K, V))
    visible = torch.rand(B, 1, S, device=DEVICE) < 0.5
    visible[0, 0, : S // 2] = False
    visible[-1] = B == 1
    logits = Logits(K**-0.5)
    wanted = attention.cached(q.double(), k.double(), v.double(), visible, None, logits)
    y = select("attention", Target("triton", DEVICE, dtype)).kernels.cached(q, k, v, visible, None, logits)
    assert y.dtype == dtype
    assert rms_ratio(y, wanted) < BOUNDS[dtype]


def test_other_queries_and_logits_are_pytorchs() -> None:
    ops = select("attention", Target("triton", DEVICE)).kernels
    q, k, v = (torch.randn(2, t, 2, 8, device=DEVICE) for t in (3, 9, 9))
    visible = torch.rand(2, 3, 9, device=DEVICE) < 0.5
    for asked in (Logits(0.3), Logits(0.3, softcap=2.0)):
        wanted = attention.cached(q, k, v, visible, None, asked)
        assert torch.equal(ops.cached(q, k, v, visible, None, asked), wanted)


def test_float64_is_refused() -> None:
    for operation in ("retention", "attention"):
        with pytest.raises(ValueError, match="float64"):
            select(operation, Target("triton", DEVICE, torch.float64))
