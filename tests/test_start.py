"""Weights start as each mixer's paper has them, whatever the stack's dtype, and outputs by the depth of the stack."""

import math

import pytest
import torch
from torch import Tensor, nn

import eulerstack as es
from eulerstack.mixers import Retention
from eulerstack.mixers.retention import Decay

OUTPUTS = ("o_proj", "out_proj", "down_proj")
LAYERS = ("mamba1", "mamba2", "rwkv", "hyena", "linear", "gated retnet", "latent attention", "experts")
pytestmark = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def stack(dtype: torch.dtype, *settings: str) -> es.Stack:
    torch.manual_seed(0)
    return es.build(es.load("every_mixer_mini", settings), dtype=dtype, kernels="torch")


def weights(model: es.Stack, layer: str) -> dict[str, Tensor]:
    """A mixer's weights by name, in float64."""
    mixer = model.blocks[LAYERS.index(layer)].mixer
    return {name: weight.detach().double() for name, weight in mixer.named_parameters()}


def check_dt(bias: Tensor) -> None:
    """softplus(bias) is log-uniform in [1e-3, 0.1]."""
    dt = torch.log1p(bias.exp())
    low, high = dt.log().aminmax()
    assert math.log(1e-3) - 1e-3 < low < math.log(2e-3)
    assert math.log(5e-2) < high < math.log(0.1) + 1e-3
    assert dt.log().median() == pytest.approx(math.log(1e-2), abs=0.6)


def test_mamba(dtype: torch.dtype) -> None:
    model = stack(dtype, "layer_templates.mamba2.mixer.mamba.head_dim=1")
    first, second = weights(model, "mamba1"), weights(model, "mamba2")
    numbers = torch.arange(1, 17).double().expand(256, 16)
    assert torch.equal(first["scan.A_log"], numbers.log().float().double())
    rates = second["scan.A_log"].exp()
    assert rates.min() >= 1 - 1e-6
    assert rates.max() <= 16 + 1e-5
    assert rates.quantile(0.5) == pytest.approx(8.5, rel=0.2)
    for scan in (first, second):
        assert scan["scan.D"].eq(1).all()
        check_dt(scan["scan.dt_bias"])


def test_retnet(dtype: torch.dtype) -> None:
    wanted = 1 - torch.exp2(-5.0 - torch.arange(8).double())
    for gamma in ("eq8", "learned"):
        mixer = es.StackBuilder(64, 8).add("retnet", {"gamma": gamma}).build(dtype=dtype).blocks[0].mixer
        assert isinstance(mixer, Retention)
        found = mixer.decay(torch.zeros(1, 1, 64, dtype=dtype)).detach().double().exp()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    gated = stack(dtype).blocks[LAYERS.index("gated retnet")].mixer.get_submodule("decay")
    assert isinstance(gated, Decay)
    left = gated(torch.zeros(1, 1, 128, dtype=dtype)).exp()
    torch.testing.assert_close(left, torch.full_like(left, 0.5 ** (1 / 16)))


def test_rwkv(dtype: torch.dtype) -> None:
    found, ramp = weights(stack(dtype), "rwkv"), torch.linspace(0, 1, 128).double()
    torch.testing.assert_close(found["time.decay"], -5 + 8 * ramp**1.35, rtol=0, atol=1e-5)
    assert sorted({round(u - math.log(0.3), 4) for u in found["time.bonus"].tolist()}) == [-0.5, 0, 0.5]
    for mix in ("mix_k", "mix_v", "mix_r"):
        assert (found[mix].diff() >= 0).all()


def test_hyena(dtype: torch.dtype) -> None:
    assert weights(stack(dtype), "hyena")["skip"].eq(1).all()


def test_linear_weights_by_their_inputs_and_outputs_by_the_depth(dtype: torch.dtype) -> None:
    """Uniform with deviation 1 / sqrt(3 inputs), those into the stream over sqrt(their number); the embedding 0.02."""
    model = stack(dtype)
    adds = sum(1 + (block.ffn is not None) for block in model.blocks)
    assert model.embedding.weight.detach().double().std() == pytest.approx(0.02, rel=0.02)
    for name, layer in model.layers.named_modules():
        weight = getattr(layer, "weight", None)
        if not name.endswith("proj") or weight is None or weight.numel() < 1000:
            continue
        last = name.rpartition(".")[2] in OUTPUTS and "filter" not in name
        wanted = (3 * weight.shape[-1]) ** -0.5 * (adds**-0.5 if last else 1)
        assert weight.detach().double().std() == pytest.approx(wanted, rel=0.06), name
        assert isinstance(layer, nn.Linear) or "experts" in name


def test_branches_add_up_to_one_mixer(dtype: torch.dtype) -> None:
    branches = {"a": {"type": "attention"}, "r": {"type": "retnet"}}
    for selector, share in (("sum", 0.5**0.5), ("learned_gate", 2**0.5)):
        spec = es.StackBuilder(128, 4).add("branched", {"branches": branches, "selector": {"type": selector}}).spec()
        weight = es.build(spec, dtype=dtype).get_parameter("layers.0.mixer.branches.0.o_proj.weight")
        assert weight.detach().double().std() == pytest.approx((3 * 128 * 2) ** -0.5 * share, rel=0.05)
