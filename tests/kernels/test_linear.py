"""The product of few rows: its result, and when it leaves the product to PyTorch."""

import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import eulerstack as es
from eulerstack.kernels.linear import FEW
from eulerstack.kernels.linear import torch as reference
from eulerstack.kernels.provider import Target
from eulerstack.kernels.select import select
from eulerstack.layers.linear import is_bare, project, project_each
from eulerstack.layers.serve import serve

from ..conftest import close, close_by_terms

pytest.importorskip("numba")

from eulerstack.kernels import compiled
from eulerstack.kernels.compiled import openmp
from eulerstack.kernels.linear import numba as fast

if openmp() is None:
    pytest.skip("this PyTorch does not run on GNU's OpenMP", allow_module_level=True)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that the loops made."""
    found: list[int] = []
    products = fast._products

    def counted(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        found.append(x.numel() // x.shape[-1])
        return products(x, weights)

    monkeypatch.setattr(fast, "_products", counted)
    return found


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    return fast.linear(x, weights, [None] * len(weights))


@settings(max_examples=60)
@given(
    rows=st.integers(1, FEW),
    inputs=st.integers(1, 600),
    outputs=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    threads=st.integers(1, 4),
)
def test_is_pytorchs_product(rows: int, inputs: int, outputs: list[int], threads: int) -> None:
    x, weights = torch.randn(rows, 1, inputs), [torch.randn(n, inputs) for n in outputs]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = fast._products(x, weights)
    finally:
        torch.set_num_threads(before)
    x, weight = x.double(), torch.cat(weights).double()
    close_by_terms(y.double(), F.linear(x, weight), F.linear(x.abs(), weight.abs()))


def test_does_not_depend_on_the_threads() -> None:
    x, weight = torch.randn(7, 300), torch.randn(999, 300)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fast._products(x, [weight]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


W, FEW_ROWS = torch.randn(256, 128), torch.randn(2, 1, 128)
LEFT_TO_PYTORCH = {
    "many rows": (torch.randn(FEW + 1, 128), W),
    "no rows": (torch.randn(0, 128), W),
    "a small weight": (FEW_ROWS, W[:8]),
    "float64": (FEW_ROWS.double(), W.double()),
    "bfloat16": (FEW_ROWS.bfloat16(), W.bfloat16()),
    "a weight that is not contiguous": (FEW_ROWS, torch.randn(128, 256).T),
    "meta": (FEW_ROWS.to("meta"), W.to("meta")),
}


@pytest.mark.parametrize("case", LEFT_TO_PYTORCH)
def test_leaves_to_pytorch(case: str, products: list[int]) -> None:
    x, weight = LEFT_TO_PYTORCH[case]
    y = linear(x, weight)
    assert y.device.type == "meta" or torch.equal(y, F.linear(x, weight))
    assert not products


def test_takes_rows_that_are_not_contiguous(products: list[int]) -> None:
    x = torch.randn(128, 3).T
    close(linear(x, W), F.linear(x, W), 1e-5)
    assert products == [3]


def test_leaves_gradients_autocast_and_wrong_widths_to_pytorch(products: list[int]) -> None:
    weight = nn.Parameter(W.clone())
    assert linear(FEW_ROWS, weight).requires_grad
    assert linear(FEW_ROWS, W, weight).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(FEW_ROWS, W).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(FEW_ROWS[..., :127], W)
    assert not products
    with torch.no_grad():
        linear(FEW_ROWS, weight)
        linear(FEW_ROWS, weight, W)
    assert products == [2, 2]


def test_by_name_and_by_itself() -> None:
    assert select("linear", Target()).provider == "numba"
    assert select("linear", Target("torch")).kernels is reference.linear
    assert select("linear", Target(dtype=torch.float64)).provider == "torch"
    assert select("linear", Target(device="cuda")).provider == "torch"


def test_without_openmp_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "openmp", lambda: None)
    assert select("linear", Target()).provider != "numba"
    assert "OpenMP" in select("linear", Target()).reason


def test_serves_every_linear_layer_of_a_stack() -> None:
    stack = es.build(es.load("every_mixer_mini"))
    layers = {name: m for name, m in stack.named_modules() if isinstance(m, nn.Linear)}
    bare = [layer for layer in layers.values() if is_bare(layer)]
    assert len(bare) > 30
    assert all(layer.ops is fast.linear for layer in bare)
    others = [name for name, layer in layers.items() if not is_bare(layer)]
    assert all("filter" in name or "router" in name for name in others), others


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_joined_is_each_by_itself(rows: int, bias: bool) -> None:
    layers = [nn.Linear(400, width, bias=bias) for width in (30, 5, 8)]
    x = torch.randn(1, rows, 400)
    serve(nn.ModuleList(layers), Target())
    with torch.no_grad():
        wanted = torch.cat([F.linear(x, layer.weight, layer.bias) for layer in layers], -1)
        close(project(x, *layers), wanted, 1e-5)
        close(torch.cat(tuple(project_each(x, *layers)), -1), wanted, 1e-5)
    close(project(x, *layers), wanted, 1e-5)


def test_a_forked_process_multiplies_too() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as PyTorch's own workers do
    wanted, child = linear(FEW_ROWS, W), os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(FEW_ROWS, W), wanted) else 1)
    torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
