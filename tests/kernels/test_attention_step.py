"""One query over a cache in loops, against PyTorch's provider."""

import pytest
import torch

from eulerstack.kernels.attention import Logits
from eulerstack.kernels.attention import torch as reference

from ..conftest import close

pytest.importorskip("numba")

from eulerstack.kernels.attention import numba as fast
from eulerstack.kernels.compiled import openmp

if openmp() is None:
    pytest.skip("this PyTorch does not run on GNU's OpenMP", allow_module_level=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize(("batch", "slots"), [(1, 1), (1, 50), (3, 17), (5, 300)])
def test_is_the_reference(batch: int, slots: int, heads: tuple[int, int], threads: int) -> None:
    many, few = heads
    q = torch.randn(batch, 1, many, 9)
    k, v = torch.randn(batch, slots + 3, few, 9)[:, :slots], torch.randn(batch, slots + 3, few, 5)[:, :slots]
    visible = torch.rand(batch, 1, slots) > 0.3
    visible[0] = False  # a row of padding sees nothing
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = fast.cached(q, k, v, visible, None, Logits(0.3))
    finally:
        torch.set_num_threads(before)
    close(found, reference.cached(q, k, v, visible, None, Logits(0.3)), 1e-5)
    assert not found[0].any()


def test_takes_values_that_lie_among_others() -> None:
    q, latent = torch.randn(2, 1, 4, 8), torch.randn(2, 11, 12)
    k, v = torch.randn(2, 11, 1, 8), latent[:, :, None, :7]
    visible = torch.ones(1, 1, 11, dtype=torch.bool)
    close(fast.cached(q, k, v, visible, None, Logits(1.0)), reference.cached(q, k, v, visible, None, Logits(1.0)), 1e-5)


def test_leaves_the_rest_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "on_openmp", None)
    q, k, visible = torch.randn(2, 1, 4, 8), torch.randn(2, 11, 4, 8), torch.ones(2, 1, 11, dtype=torch.bool)
    rules = (Logits(1.0, softcap=3.0), Logits(1.0, sinks=torch.zeros(4, 1)))
    for logits in rules:
        fast.cached(q, k, k, visible, None, logits)
    assert fast.cached(q.requires_grad_(), k, k, visible, None, Logits(1.0)).requires_grad
    fast.cached(q.detach().double(), k.double(), k.double(), visible, None, Logits(1.0))
    fast.cached(torch.randn(2, 2, 4, 8), k, k, visible.expand(2, 2, 11), None, Logits(1.0))
    fast.cached(q.detach(), k.transpose(1, 2).contiguous().transpose(1, 2), k, visible, None, Logits(1.0))


def test_another_batch_is_pytorchs_error() -> None:
    k, visible = torch.randn(3, 11, 4, 8), torch.ones(1, 1, 11, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fast.cached(torch.randn(2, 1, 4, 8), k, k, visible, None, Logits(1.0))
