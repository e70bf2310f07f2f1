"""One token of retention in a loop, against the PyTorch provider."""

import pytest
import torch

from eulerstack.kernels.retention import torch as reference
from eulerstack.segments import Segments

from ..conftest import close

pytest.importorskip("numba")

from eulerstack.kernels.compiled import openmp
from eulerstack.kernels.retention import step

if openmp() is None:
    pytest.skip("this PyTorch does not run on GNU's OpenMP", allow_module_level=True)

B, G, K, V = 3, 2, 5, 70
REAL = torch.tensor([[True], [False], [True]])
PLACES = {
    "plain": Segments(),
    "padding": Segments(real=REAL),
    "a new document": Segments(document=torch.zeros(B, 1, dtype=torch.int64), carries=REAL[:, 0]),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_is_the_reference(where: str, each: bool, heads: int, turned: bool, threads: int) -> None:
    segments = PLACES[where].placed(torch.full((B,), 7), 1)
    q, k, v = torch.randn(B, 1, G, K), torch.randn(B, 1, G, K), torch.randn(B, 1, heads, V)
    log = -torch.rand((B, 1, heads) if each else (heads,), dtype=torch.float64)
    state = torch.randn(B, heads, V, K).mT if turned else torch.randn(B, heads, K, V)
    kept, before = state.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = step.recurrent(q, k, v, log, state, segments)
    finally:
        torch.set_num_threads(before)
    for got, wanted in zip(found, reference.recurrent(q, k, v, log, kept, segments), strict=True):
        close(got, wanted, 1e-6)
    assert torch.equal(state, kept)


def test_leaves_gradients_and_float64_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_stepped", None)
    segments = Segments.dense(1, 3)
    inputs = [torch.randn(B, 1, G, K), torch.randn(B, 1, G, K), torch.randn(B, 1, G, V), torch.zeros(G)]
    state = torch.randn(B, G, K, V)
    y, _ = step.recurrent(*inputs, state.clone().requires_grad_(), segments)
    assert y.requires_grad
    y, _ = step.recurrent(*(t.double() for t in inputs), state.double(), segments)
    assert y.dtype == torch.float64


def test_another_batch_is_pytorchs_error() -> None:
    inputs = [torch.randn(2, 1, G, K), torch.randn(2, 1, G, K), torch.randn(2, 1, G, V), torch.zeros(G)]
    with pytest.raises(RuntimeError, match="size of tensor"):
        step.recurrent(*inputs, torch.randn(B, G, K, V), Segments.dense(1, 3))
