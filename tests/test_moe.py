"""Mixtures of experts: against transformers, against all experts computed and masked, and how they balance."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eulerstack.layers.ffn import GATES
from eulerstack.layers.moe import MoE
from eulerstack.spec import MoEFFNSpec

from .conftest import FP32, FP64, close, rms_ratio

WIDTH, HIDDEN = 16, 24
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "one choice": {"top_k": 1},
    "every expert": {"experts": 3, "top_k": 3},
    "one expert": {"experts": 1, "top_k": 1},
    "softmax, bias": {"bias_correction": {}, "top_k": 3},
    "sigmoid": {"router": "sigmoid"},
    "sigmoid, bias, shared": {"router": "sigmoid", "bias_correction": {}, "shared_experts": 2},
}


def make(
    moe: dict[str, Any], dtype: torch.dtype = torch.float64, activation: str = "swiglu", scale: float = 2.0
) -> MoE:
    """Weights scaled up so that routers choose clearly, and a bias that moves the choices."""
    torch.manual_seed(0)
    layer = MoE(MoEFFNSpec.model_validate({"type": "moe", "activation": activation, "moe": moe}), WIDTH, HIDDEN)
    layer.reset_parameters()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(scale)
        if layer.correction is not None:
            layer.correction.bias.uniform_(-0.3, 0.3)
    return layer.to(dtype)


def dense(layer: MoE, x: Tensor, activation: str = "swiglu") -> Tensor:
    """Every expert for every token of x [B, T, D], weighted by zero where it was not chosen."""
    logits = layer.router_proj(x)
    scores = logits.softmax(-1) if layer.spec.router == "softmax" else logits.sigmoid()
    bias = 0 if layer.correction is None else layer.correction.bias
    chosen = ((logits if layer.spec.router == "softmax" else scores) + bias).topk(layer.spec.top_k).indices
    weights = scores * torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    weights = weights / weights.sum(-1, keepdim=True)
    experts = layer.experts
    gate, up = (torch.einsum("btd,ehd->bteh", x, p.weight) for p in (experts.gate_proj, experts.up_proj))
    each = torch.einsum("bteh,edh->bted", GATES[activation](gate, up), experts.down_proj.weight)
    y = (weights[..., None] * each).sum(2)
    return y if layer.shared is None else y + layer.shared(x)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_all_experts_masked_with_gradients(variant: str, activation: str) -> None:
    layer = make(VARIANTS[variant], activation=activation)
    x = torch.randn(2, 30, WIDTH, dtype=torch.float64, requires_grad=True)
    grad, leaves = torch.randn_like(x), (x, *layer.parameters())
    got, wanted = layer(x)[0], dense(layer, x, activation)
    close(got, wanted, FP64)
    for one, other in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        assert torch.allclose(one, other, rtol=FP64, atol=FP64 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_statistics_are_their_formulas(variant: str) -> None:
    layer = make(VARIANTS[variant])
    x = torch.randn(2, 30, WIDTH, dtype=torch.float64)
    routing = layer(x)[1]
    experts, logits = layer.spec.experts, layer.router_proj(x).flatten(0, 1)
    scores = logits.softmax(1) if layer.spec.router == "softmax" else logits.sigmoid()
    ranked = (logits if layer.spec.router == "softmax" else scores) + (layer.correction.bias if layer.correction else 0)
    load = F.one_hot(ranked.topk(layer.spec.top_k).indices, experts).sum((0, 1)).double()
    close(routing.load, load, 0.0)
    probability = (scores / scores.sum(1, keepdim=True)).mean(0)
    close(routing.losses()[0], experts * (load / load.sum() * probability).sum(), FP64)
    close(routing.losses()[1], logits.exp().sum(1).log().square().mean(), FP64)
    leaves = (layer.router_proj.weight,)
    wanted = torch.autograd.grad(experts * (load / load.sum() * probability).sum(), leaves)[0]
    got = torch.autograd.grad(routing.losses()[0], leaves)[0]
    assert torch.allclose(got, wanted, rtol=0, atol=FP64)
    assert not routing.load.requires_grad


def test_balance_is_one_when_balanced() -> None:
    layer = make({"experts": 4, "top_k": 1})
    with torch.no_grad():
        layer.router_proj.weight.copy_(torch.eye(4, WIDTH))
    x = torch.eye(4, WIDTH, dtype=torch.float64)[None] * 5
    assert layer(x)[1].losses()[0].item() == pytest.approx(1.0, abs=1e-12)
    assert layer(x[:, :1])[1].losses()[0].item() > 2.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_is_served_whoever_else_is_there(variant: str) -> None:
    layer = make(VARIANTS[variant])
    x = torch.randn(3, 20, WIDTH, dtype=torch.float64)
    wanted = layer(x)[0]
    alone = torch.cat([layer(row[None, None])[0] for row in x.flatten(0, 1)], 1)
    close(alone.view_as(x), wanted, FP64)
    close(layer(x.flip(0, 1))[0].flip(0, 1), wanted, FP64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_is_not_routed(variant: str) -> None:
    layer = make(VARIANTS[variant])
    x = torch.randn(3, 20, WIDTH, dtype=torch.float64)
    real = torch.arange(20)[None] < torch.tensor([[20], [7], [0]])
    padded = x.masked_fill(~real[..., None], torch.nan).requires_grad_()
    y, routing = layer(padded, real)
    wanted, alone = layer(x[real][None])
    close(y[real], wanted[0], FP64)
    assert not y[~real].any()
    for got, one in zip(routing, alone, strict=True):
        close(got, one, FP64)
    (y.sum() + routing.losses()[0] + routing.losses()[1]).backward()
    assert padded.grad is not None and torch.isfinite(padded.grad).all() and not padded.grad[~real].any()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_a_call_without_real_tokens_is_zero() -> None:
    layer = make({"shared_experts": 1})
    y, routing = layer(torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.bool))
    assert y.shape == (2, 5, WIDTH) and not y.any()
    assert not routing.losses()[0] and not routing.losses()[1] and not routing.load.any()
    (y.sum() + routing.losses()[0] + routing.losses()[1]).backward()
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


def test_experts_that_are_not_chosen_do_not_compute() -> None:
    layer = make({"experts": 6, "top_k": 2})
    x = torch.randn(1, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted, routing = layer(x)
    idle = routing.load == 0
    assert idle.sum() >= 2
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight[idle] = torch.nan
    y = layer(x)[0]
    close(y, wanted, 0.0)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    for weight in layer.experts.parameters():
        assert not weight.grad[idle].any() and weight.grad[~idle].any()


def test_frozen_experts_let_gradients_through() -> None:
    layer = make({})
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x)[0].sum(), x)[0]
    layer.experts.requires_grad_(False)
    close(torch.autograd.grad(layer(x)[0].sum(), x)[0], wanted, 0.0)


@torch.no_grad()
@pytest.mark.parametrize(("router", "rate"), [("softmax", 0.02), ("sigmoid", 0.005)])
def test_the_bias_balances_a_skewed_router(router: str, rate: float) -> None:
    layer = make({"router": router, "bias_correction": {"update_rate": rate}}, torch.float32)
    torch.nn.init.zeros_(layer.correction.bias)
    skew = torch.linspace(-1, 1, 8)[:, None] * torch.eye(1, WIDTH)
    layer.router_proj.weight.mul_(0.3).add_(skew)
    x = torch.randn(1, 128, WIDTH) + torch.eye(1, WIDTH)
    wanted, loads = [p.clone() for p in layer.parameters()], []
    for _ in range(200):
        loads.append(layer(x)[1].load)
        layer.rebalance(loads[-1])
    before, after = loads[0], torch.stack(loads[-20:]).mean(0)
    assert before.max() > 2 * before.mean()
    assert after.max() < 1.1 * after.mean()
    assert not layer.correction.bias.requires_grad
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(layer.parameters(), wanted, strict=True))


def test_the_bias_moves_choices_and_nothing_else() -> None:
    layer = make({"router": "sigmoid", "bias_correction": {}})
    x = torch.randn(1, 40, WIDTH, dtype=torch.float64)
    leaves = tuple(layer.parameters())
    y, load = layer(x)[0], layer(x)[1].load
    wanted = torch.autograd.grad(y.square().sum(), leaves)
    layer.correction.bias += 5.0  # the same for all: no choice changes
    for got, old in zip(torch.autograd.grad(layer(x)[0].square().sum(), leaves), wanted, strict=True):
        close(got, old, 0.0)
    layer.correction.bias[3] += 9.0
    assert layer(x)[1].load[3] == 40 > load[3]


def test_a_router_without_a_bias_is_not_rebalanced() -> None:
    layer = make({"bias_correction": {"enabled": False}})
    layer.rebalance(layer(torch.randn(1, 4, WIDTH, dtype=torch.float64))[1].load)
    assert layer.correction is None
    assert not list(layer.buffers())


def test_the_bias_stays_float32() -> None:
    moe = {"bias_correction": {}, "shared_experts": 1}
    half, other = make(moe, torch.bfloat16), make(moe, torch.bfloat16)
    assert half.correction.bias.dtype == torch.float32
    half.correction.bias[0] = 0.1 + 1e-6
    other.load_state_dict(half.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), half.state_dict().values(), strict=True))
    narrow = {name: t.bfloat16() for name, t in half.state_dict().items()}
    other.load_state_dict(narrow, assign=True)
    dtypes = {name: t.dtype for name, t in other.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"correction.bias"}
    assert make(moe, torch.bfloat16).to_empty(device="cpu").correction.bias.dtype == torch.float32


def test_bfloat16_and_autocast_are_near_float64() -> None:
    half = make({"top_k": 2, "experts": 4}, torch.bfloat16)
    x = torch.randn(2, 50, WIDTH, dtype=torch.bfloat16)
    wanted = make({"top_k": 2, "experts": 4}, torch.bfloat16).double()(x.double())[0]
    y, routing = half(x)
    assert y.dtype == torch.bfloat16 and {t.dtype for t in routing} == {torch.float32}
    assert rms_ratio(y, wanted) < 1e-2
    y.sum().backward()
    assert half.experts.down_proj.weight.grad.dtype == torch.bfloat16
    full, x = half.float(), x.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = full(x)
    assert y.dtype == torch.bfloat16 and {t.dtype for t in routing} == {torch.float32}
    assert rms_ratio(y, wanted) < 1e-2
    (y.float().sum() + routing.losses()[0]).backward()
    assert x.grad.dtype == torch.float32


def test_sigmoids_that_underflow_still_weigh() -> None:
    layer = make({"router": "sigmoid"}, torch.float32, scale=1.0)
    with torch.no_grad():
        layer.router_proj.weight.copy_(-200 - torch.arange(8.0)[:, None] * torch.eye(1, WIDTH))
    y, routing = layer(torch.ones(1, 3, WIDTH))
    assert torch.isfinite(y).all() and torch.isfinite(torch.stack(routing.losses())).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_and_parameters_count_what_a_token_uses(variant: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer = make(VARIANTS[variant])
    spec, expert = layer.spec, 3 * WIDTH * HIDDEN
    assert layer.active_parameters == spec.experts * WIDTH + (spec.top_k + spec.shared_experts) * expert
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 25, WIDTH, dtype=torch.float64))
    assert layer.flops(50) == 2 * 50 * layer.active_parameters
    weighing = 2 * 50 * spec.top_k * WIDTH  # no weights take part in it
    assert counter.get_total_flops() == layer.flops(50) + weighing


def test_weights_are_drawn_like_linears() -> None:
    layer = MoE(MoEFFNSpec.model_validate({"type": "moe", "moe": {"shared_experts": 1}}), 64, 48)
    layer.reset_parameters(0.5)
    for name, weight in layer.named_parameters():
        wanted = (0.5 if "down_proj" in name else 1.0) / weight.shape[-1] ** 0.5
        assert wanted * 0.95 < weight.abs().max() <= wanted, name


def copy_experts(theirs: Any, layer: MoE) -> None:
    """transformers stacks gate and up in one tensor [E, 2 * hidden, D]."""
    ours = layer.experts
    theirs.experts.gate_up_proj.copy_(torch.cat([ours.gate_proj.weight, ours.up_proj.weight], 1))
    theirs.experts.down_proj.copy_(ours.down_proj.weight)
    theirs.gate.weight.copy_(layer.router_proj.weight)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_softmax_routing_is_mixtral(top_k: int) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layer = make({"top_k": top_k}, torch.float32)
    config = mixtral.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=8, num_experts_per_tok=top_k
    )
    theirs = mixtral.MixtralSparseMoeBlock(config).eval()
    copy_experts(theirs, layer)
    x = torch.randn(2, 50, WIDTH)
    close(layer(x)[0], theirs(x), FP32)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_balance_is_mixtral_by_top_k(top_k: int, padded: bool) -> None:
    """transformers divides choices by tokens, not by choices: its loss is top_k of ours, top_k when balanced."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layer = make({"top_k": top_k}, torch.float32)
    x = torch.randn(2, 50, WIDTH)
    real = torch.arange(50)[None] < torch.tensor([[50], [13]]) if padded else None
    got = layer(x, real)[1].losses()[0]
    logits = layer.router_proj(x).flatten(0, 1)
    wanted = mixtral.load_balancing_loss_func((logits,), 8, top_k, None if real is None else real.long()) / top_k
    close(got, wanted, FP32)
    weight = layer.router_proj.weight
    close(torch.autograd.grad(got, weight)[0], torch.autograd.grad(wanted, weight)[0], FP32)


@torch.no_grad()
@pytest.mark.parametrize("shared", [1, 2])
def test_sigmoid_routing_is_deepseek_v3(shared: int) -> None:
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    moe = {"top_k": 3, "router": "sigmoid", "bias_correction": {}, "shared_experts": shared}
    layer = make(moe, torch.float32)
    groups = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
    experts = {"n_routed_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": shared}
    config = deepseek.DeepseekV3Config(hidden_size=WIDTH, moe_intermediate_size=HIDDEN, **experts, **groups)
    theirs = deepseek.DeepseekV3MoE(config).eval()
    copy_experts(theirs, layer)
    theirs.gate.e_score_correction_bias.copy_(layer.correction.bias)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(theirs.shared_experts, name).weight.copy_(getattr(layer.shared, name).weight)
    x = torch.randn(2, 50, WIDTH)
    close(layer(x)[0], theirs(x), FP32)
    unbiased = make({**moe, "bias_correction": None}, torch.float32)
    assert not torch.equal(unbiased(x)[1].load, layer(x)[1].load)
