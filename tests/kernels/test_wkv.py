"""RWKV's weighted mean against its definition, with keys of any size."""

import pytest
import torch
from torch import Tensor

from eulerstack.kernels.wkv import torch as wkv
from eulerstack.segments import Segments

from ..conftest import close

B, T, D = 2, 19, 3


def drawn(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v, w, u in float64."""
    k, v = scale * torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, T, D, dtype=torch.float64)
    return k, v, torch.rand(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)


def defined(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The paper's equation 16, sum by sum, in logarithms."""
    outs = []
    for t in range(k.shape[1]):
        logs = [k[:, i] - (t - 1 - i) * w for i in range(t)] + [u + k[:, t]]
        outs.append((torch.stack(logs, 1).softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(outs, 1)


def nothing(dtype: torch.dtype = torch.float64) -> wkv.State:
    return torch.zeros(B, D, dtype=dtype), torch.zeros(B, D, dtype=dtype), torch.zeros(B, D, dtype=dtype)


def every_form(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """y of each form and, for those that return one, the sums after it."""
    found: dict[str, tuple[Tensor, ...]] = {"parallel": (wkv.parallel(k, v, w, u, Segments.dense(T)),)}
    for size in (1, 5, 64):
        y, state = wkv.chunkwise(k, v, w, u, nothing(v.dtype), Segments.dense(T), size)
        found[f"chunk {size}"] = (y, *state)
    state, outs = nothing(v.dtype), []
    for t in range(T):
        y, state = wkv.recurrent(k[:, t : t + 1], v[:, t : t + 1], w, u, state, Segments.dense(1, t))
        outs.append(y)
    return found | {"steps": (torch.cat(outs, 1), *state)}


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
def test_every_form_is_the_definition(scale: float) -> None:
    inputs = drawn(scale)
    for _, (y, *state) in every_form(*inputs).items():
        close(y, defined(*inputs), 1e-12)
        for got, wanted in zip(state, every_form(*inputs)["steps"][1:], strict=False):
            close(got, wanted, 1e-12)


@pytest.mark.parametrize("size", [1e3, 1e10, 1e30])
def test_keys_of_any_size_give_numbers(size: float) -> None:
    k, v, w, u = (t.float().requires_grad_() for t in drawn())
    for sign in (size, -size):
        for y, *_ in every_form(k * sign, v, w, u).values():
            assert torch.isfinite(y).all()
            assert y.abs().max() <= v.abs().max() * (1 + 1e-5)
            for grad in torch.autograd.grad(y.sum(), (k, v, w, u), retain_graph=True):
                assert torch.isfinite(grad).all()


@pytest.mark.parametrize("form", ["chunk 5", *(pytest.param(f, marks=pytest.mark.slow) for f in ("parallel", "steps"))])
def test_gradients(form: str) -> None:
    inputs = [t.requires_grad_() for t in drawn()]
    assert torch.autograd.gradcheck(lambda *a: every_form(*a)[form][0], inputs)
