"""Numba's loops against PyTorch's kernels: results and gradients, for every placement."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eulerstack.kernels.conv import torch as conv
from eulerstack.kernels.retention import torch as retention
from eulerstack.kernels.ssd import torch as ssd
from eulerstack.segments import Segments

from ..conftest import close
from .test_selective_scan import placements

pytest.importorskip("numba")

from eulerstack.kernels.compiled import exp, spread
from eulerstack.kernels.conv import numba as fast_conv
from eulerstack.kernels.retention import numba as fast_retention
from eulerstack.kernels.ssd import numba as fast_ssd

B, T, G, H, K, V = 3, 23, 2, 4, 3, 5
PLACES = list(placements(T))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(fast: tuple[Tensor, ...], reference: tuple[Tensor, ...], inputs: list[Tensor], tolerance: float) -> None:
    """Outputs and gradients of a drawn projection."""
    weights = [torch.randn_like(t) for t in reference]
    found = [torch.autograd.grad(outputs, inputs, weights) for outputs in (fast, reference)]
    for got, wanted in zip((*fast, *found[0]), (*reference, *found[1]), strict=True):
        close(got, wanted, tolerance)


def decays(kind: str) -> Tensor:
    """Log decays, a leaf: a head's own, or each token's."""
    shape = (H,) if kind == "fixed" else (B, T, H)
    return (-torch.randn(shape, dtype=torch.float64).exp()).requires_grad_()


@pytest.mark.parametrize("size", [1, 4, 8, 23, 64])
@pytest.mark.parametrize("kind", ["fixed", "gated"])
@pytest.mark.parametrize("where", PLACES)
def test_retention(where: str, kind: str, size: int) -> None:
    segments = placements(T)[where]
    inputs = [drawn(B, T, G, K), drawn(B, T, G, K), drawn(B, T, H, V), decays(kind), drawn(B, H, K, V)]
    fast = fast_retention.chunkwise(*inputs, segments, size)
    same(fast, retention.chunkwise(*inputs, segments, size), inputs, 1e-12)


def test_retention_backward() -> None:
    inputs = [drawn(1, 7, 1, 2), drawn(1, 7, 1, 2), drawn(1, 7, 2, 2), drawn(1, 2, 2, 2)]
    decay = (-torch.rand(1, 7, 2, dtype=torch.float64)).requires_grad_()
    inputs.insert(3, decay)
    assert torch.autograd.gradcheck(lambda *a: fast_retention.chunkwise(*a, Segments.dense(7), 3), inputs)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("taps", [2, 4, 9])
def test_convolution(where: str, taps: int) -> None:
    segments, width = placements(T)[where], fast_conv.BLOCK + 3
    inputs = [drawn(B, T, width), drawn(width, taps), drawn(width), drawn(B, taps - 1, width)]
    same(fast_conv.convolve(*inputs, segments), conv.convolve(*inputs, segments), inputs, 1e-12)


@pytest.mark.parametrize("kernels", [ssd, fast_ssd], ids=["torch", "numba"])
def test_ssd_holds_under_strong_decays(kernels) -> None:  # type: ignore[no-untyped-def]
    """A = -16 and dt = 1 over chunks of 256: every decay, state and gradient to 1e-5 in float32."""
    tokens, heads, groups, state, channels = 4096, 2, 1, 8, 4
    shapes = [(1, tokens, heads, channels), (1, tokens, heads), (heads,)] + [(1, tokens, groups, state)] * 2
    x, dt, A, b, c = (torch.randn(s) for s in shapes)
    dt, A = 1 - 0.9 * (dt > 1.5).float(), torch.tensor([-16.0, -0.02])
    opening = torch.randn(1, heads, channels, state)
    weights, found = (torch.randn(1, tokens, heads, channels), torch.randn_like(opening)), []
    for run, dtype, size in ((kernels, torch.float32, 256), (ssd, torch.float64, 16)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, dt, A, b, c, opening)]
        outputs = run.chunkwise(*leaves, Segments.dense(tokens), size)
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, [w.to(dtype) for w in weights])])
    for got, wanted in zip(*found, strict=True):
        close(got.double(), wanted, 1e-5)


def test_the_exponential() -> None:
    """In float32 within 2e-7 of the true one, zero below e^-60; NaN and infinities keep their meaning."""
    from numba import njit, vectorize

    @njit
    def compiled_exp(x: float) -> float:
        return exp(x)  # type: ignore[no-any-return]

    of_all = vectorize(["float32(float32)"])(compiled_exp)
    x = torch.linspace(-59.9, 88, 100_001)
    y = torch.from_numpy(of_all(x.numpy()))
    assert ((y.double() / x.double().exp()) - 1).abs().max() < 2e-7
    with np.errstate(invalid="ignore"):
        ends = of_all(torch.tensor([-61.0, -torch.inf, -1e30, torch.nan, 0.0]).numpy())
    assert ends[:3].tolist() == [0, 0, 0]
    assert ends[3] != ends[3]
    assert ends[4] == 1


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_share_is_taken_once(count: int) -> None:
    taken: list[int] = []
    spread(lambda begin, end, to: to.extend(range(begin, end)), count, taken)
    assert sorted(taken) == list(range(count))


def test_an_error_in_a_share_is_not_lost() -> None:
    def loop(begin: int, end: int) -> None:
        if begin == 0:
            raise RuntimeError("of the first share")

    with pytest.raises(RuntimeError, match="first share"):
        spread(loop, 2)
