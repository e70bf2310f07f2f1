"""flash-linear-attention's kernels against PyTorch's, on a GPU or through Triton's interpreter (`make test-triton`)."""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eulerstack.kernels.provider import Target
from eulerstack.kernels.retention import torch as reference
from eulerstack.kernels.select import select
from eulerstack.kernels.ssd import torch as ssd

from ..conftest import rms_ratio
from .test_selective_scan import placements

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, G, H, K, V = 23, 2, 4, 16, 32

pytestmark = pytest.mark.gpu

if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that it imports, and that there is no GPU
    pytest.importorskip("fla.ops.simple_gla")


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing can be timed without a GPU, a kernel's loop must count in tensors, as a compiled one does, and the
    exponentials that a kernel masks afterwards may overflow.
    """
    if DEVICE == "cuda":
        yield
        return
    from fla.ops.common import chunk_h
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **meta: [1.0, 1.0, 1.0])
    monkeypatch.setattr(chunk_h, "range", tensors, raising=False)
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def tensors(*bounds: Any) -> Iterator[Any]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    for i in range(*(int(b) for b in bounds)):
        yield tl.tensor(TensorHandle(np.array([i], np.int32), tl.int32), tl.int32)


def drawn(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v in the dtype; log decays and a state in float32."""
    width = V + 1 if kind == "none" else V  # linear attention: one channel more, and no decay
    q, k, v, state = (torch.randn(s) for s in [(3, T, G, K)] * 2 + [(3, T, H, width), (3, H, K, width)])
    decay = {"fixed": -torch.rand(H) / 4, "gated": -torch.rand(3, T, H), "none": torch.zeros(H)}[kind]
    return [t.to(DEVICE) for t in (q.to(dtype), k.to(dtype), v.to(dtype), decay, state)]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in ("fixed", "gated") for dtype in (torch.float32, torch.float16)]
    + [("none", torch.float32)],  # linear attention computes in float32
)
@pytest.mark.parametrize("where", placements(T))
def test_outputs_states_and_gradients(where: str, kind: str, dtype: torch.dtype) -> None:
    fast = select("retention", Target("fla", DEVICE, dtype)).kernels
    segments, inputs = placements(T, DEVICE)[where], drawn(kind, dtype)
    found, weights, bound = [], list[Tensor](), 1e-3 if dtype == torch.float32 else 5e-3
    for kernels, wide in ((fast, None), (reference, torch.float64)):
        leaves = [t.to(wide or t.dtype, copy=True).requires_grad_() for t in inputs]
        y, state = kernels.chunkwise(*leaves, segments, 64)
        y = segments.mask(y)  # what stands at the padding is the mixer's to hide
        weights = weights or [torch.randn_like(t).to(dtype) for t in (y, state)]  # not rounded on the way back
        found.append([y, state, *torch.autograd.grad((y, state), leaves, [weights[0].to(y), weights[1].to(state)])])
    for got, wanted in zip(*found, strict=True):
        assert rms_ratio(got, wanted) < bound
    y, wanted = fast.parallel(*inputs[:4], segments), reference.parallel(*(t.double() for t in inputs[:4]), segments)
    assert rms_ratio(segments.mask(y), segments.mask(wanted)) < bound


def test_ssd() -> None:
    shapes = [(3, T, H, V), (3, T, H), (H,), (3, T, G, K), (3, T, G, K), (3, H, V, K)]
    x, dt, A, B, C, state = (torch.randn(s, device=DEVICE) for s in shapes)
    inputs, segments = [x, dt.exp(), -A.exp(), B, C, state], placements(T, DEVICE)["packed"]
    fast = select("ssd", Target("fla", DEVICE)).kernels.chunkwise(*inputs, segments, 64)
    wanted = ssd.chunkwise(*(t.double() for t in inputs), segments, 64)
    for one, other in zip(fast, wanted, strict=True):
        assert rms_ratio(one, other) < 1e-3


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        select("retention", Target("fla", DEVICE, torch.float64))


def test_odd_heads_are_refused_in_16_bits() -> None:
    with pytest.raises(ValueError, match="even number of channels in 16 bits, not 16 and 33"):
        select("retention", Target("fla", DEVICE, torch.bfloat16), head_dim=16, value_dim=33)
    assert select("retention", Target("fla", DEVICE), head_dim=16, value_dim=33).provider == "fla"
