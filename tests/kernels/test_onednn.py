"""The product of many rows as a convolution: its result and gradients, and when it leaves the product to PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from eulerstack.kernels.linear import FEW, onednn
from eulerstack.kernels.linear import torch as reference
from eulerstack.kernels.provider import Target
from eulerstack.kernels.select import select

from ..conftest import close, close_by_terms

Product = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], Tensor]
WIDE = onednn.LEAST // (FEW + 1) + 1  # FEW + 1 rows of it are enough


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    conv = F.conv2d

    def counted(x: Tensor, *rest: Any, **more: Any) -> Tensor:
        found.append(tuple(x.shape))
        return conv(x, *rest, **more)

    monkeypatch.setattr(F, "conv2d", counted)
    return found


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(FEW + 1, 200),
    inputs=st.integers(WIDE, WIDE + 40),
    outputs=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    bias=st.booleans(),
)
def test_is_pytorchs_product_and_has_its_gradients(
    batch: int, tokens: int, inputs: int, outputs: list[int], bias: bool
) -> None:
    """Each to the rounding of its terms, which may cancel: a bias of one output has a single sum as its gradient."""
    drawn = [torch.randn(batch, tokens, inputs), torch.randn(batch, tokens, sum(outputs))]
    drawn += [torch.randn(n, inputs) for n in outputs] + [torch.randn(n) for n in outputs if bias]

    def told(linear: Product, tensors: list[Tensor]) -> list[Tensor]:
        x, weigh, *rest = leaves = [t.clone().requires_grad_() for t in tensors]
        weights, biases = rest[: len(outputs)], rest[len(outputs) :] or [None] * len(outputs)
        y = linear(x, weights, biases)
        return [y, *torch.autograd.grad((y * weigh).sum(), leaves)]

    wide = [t.double() for t in drawn]
    terms = told(reference.linear, [t.abs() for t in wide])
    for found, wanted, size in zip(told(onednn.linear, drawn), told(reference.linear, wide), terms, strict=True):
        close_by_terms(found.double(), wanted, size, 2e-6)  # sums of up to 600 terms


X, W = torch.randn(FEW + 1, WIDE), torch.randn(24, WIDE)
LEFT_TO_PYTORCH = {
    "few rows": (torch.randn(FEW, 2 * WIDE), torch.randn(24, 2 * WIDE)),
    "few numbers": (torch.randn(FEW + 1, 64), torch.randn(24, 64)),
    "no rows": (torch.randn(0, WIDE), W),
    "float64": (X.double(), W.double()),
    "bfloat16": (X.bfloat16(), W.bfloat16()),
    "meta": (X.to("meta"), W.to("meta")),
}


@pytest.mark.parametrize("case", LEFT_TO_PYTORCH)
def test_leaves_to_pytorch(case: str, convolutions: list[tuple[int, ...]]) -> None:
    x, weight = LEFT_TO_PYTORCH[case]
    y = onednn.linear(x, [weight], [None])
    assert y.device.type == "meta" or torch.equal(y, F.linear(x, weight))
    assert not convolutions


def test_leaves_autocast_and_wrong_widths_to_pytorch(convolutions: list[tuple[int, ...]]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(X, [W], [None]).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        onednn.linear(X, [W[:, 1:]], [None])
    assert not convolutions


def test_what_it_makes_is_contiguous_and_keeps_no_copy(convolutions: list[tuple[int, ...]]) -> None:
    x, weight = X.clone().requires_grad_(), nn.Parameter(W.clone())
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = onednn.linear(x, [weight], [None])
    assert y.is_contiguous()
    assert set(kept) == {x.data_ptr(), weight.data_ptr()}
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_contiguous()
    assert len(convolutions) == 1


def test_takes_rows_that_are_not_contiguous(convolutions: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(WIDE, FEW + 1).T, torch.randn(WIDE, 24).T
    close(onednn.linear(x, [weight], [None]), F.linear(x, weight), 1e-5)
    assert len(convolutions) == 1


def test_has_the_flops_of_a_product() -> None:
    counts = []
    for linear in (onednn.linear, reference.linear):
        x, weight = X.clone().requires_grad_(), W.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            linear(x, [weight], [None]).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_has_second_gradients() -> None:
    x, weight = X.clone().requires_grad_(), W.clone().requires_grad_()
    (first,) = torch.autograd.grad(onednn.linear(x, [weight], [None]).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert second.isfinite().all()
    assert second.any()


def test_refuses_what_it_cannot_or_need_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float32 only" in (onednn.refuses(Target(dtype=torch.float64)) or "")
    assert "CPU only" in (onednn.refuses(Target(device="cuda")) or "")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "no faster on a CPU with AVX2" in (onednn.refuses(Target()) or "")
    with pytest.raises(ValueError, match=r"onednn.*AVX2"):
        select("linear", Target("onednn"))
