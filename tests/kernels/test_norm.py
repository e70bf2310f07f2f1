"""RMSNorm of few rows in a loop, against PyTorch's provider."""

import pytest
import torch

import eulerstack as es
from eulerstack.kernels.norm import torch as reference
from eulerstack.kernels.provider import Target
from eulerstack.kernels.select import select
from eulerstack.layers.norm import RMSNorm

from ..conftest import close

pytest.importorskip("numba")

from eulerstack.kernels.compiled import openmp
from eulerstack.kernels.norm import numba as fast

if openmp() is None:
    pytest.skip("this PyTorch does not run on GNU's OpenMP", allow_module_level=True)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 32, 33])
def test_is_the_reference(rows: int, groups: int) -> None:
    x, weight = 10 * torch.randn(rows, 1, 24), torch.randn(24)
    close(fast.rms_norm(x, weight, groups), reference.rms_norm(x, weight, groups), 1e-6)
    strided = torch.randn(24, rows).T
    close(fast.rms_norm(strided, weight, groups), reference.rms_norm(strided, weight, groups), 1e-6)
    small = torch.full((rows, 24), 1e-6)
    close(fast.rms_norm(small, weight, groups), reference.rms_norm(small, weight, groups), 1e-6)


def test_leaves_gradients_and_other_dtypes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "on_openmp", None)
    x, weight = torch.randn(2, 24), torch.randn(24)
    assert fast.rms_norm(x, weight.clone().requires_grad_()).requires_grad
    for dtype in (torch.float64, torch.bfloat16):
        assert fast.rms_norm(x.to(dtype), weight.to(dtype)).dtype == dtype


def test_serves_every_norm_of_a_stack() -> None:
    stack = es.build(es.load("every_mixer_mini"))
    norms = [m for m in stack.modules() if isinstance(m, RMSNorm)]
    assert len(norms) > 10
    assert all(norm.ops is fast.rms_norm for norm in norms)
    plain = es.build(es.load("every_mixer_mini"), kernels="torch")
    assert all(m.ops is reference.rms_norm for m in plain.modules() if isinstance(m, RMSNorm))
    assert select("norm", Target(dtype=torch.bfloat16)).provider == "torch"
