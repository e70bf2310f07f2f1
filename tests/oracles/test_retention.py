"""Retention against a direct float64 sum over its definition (Sun et al. 2023, section 2.1)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import eulerstack as es
from eulerstack.mixers import Mixer, make_mixer
from eulerstack.spec import expand

from ..conftest import close

WIDTH, HEADS, TOKENS = 32, 4, 40


def definition(mixer: Mixer[Any], x: Tensor, options: dict[str, Any], log_gamma: Tensor) -> Tensor:
    """o_n = sum over m <= n of (product of gamma) (Q_n e^{i n theta}) conj(K_m e^{i m theta}) v_m, in complex numbers."""
    B, T, _ = x.shape
    dim = WIDTH // HEADS
    q, k, v = (mixer.get_submodule(f"{n}_proj")(x).unflatten(-1, (HEADS, -1)) for n in "qkv")
    q, k = (torch.complex(t[..., : dim // 2], t[..., dim // 2 :]) for t in (q, k))
    theta = 10000.0 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones(T, dim // 2, dtype=torch.float64), torch.arange(T)[:, None] * theta)[:, None]
    if options.get("rope", True):
        q, k = q * turn, k * turn
    y = torch.zeros(B, T, HEADS, v.shape[-1], dtype=torch.float64)
    for n in range(T):
        for m in range(n + 1):
            score = (q[:, n] * k[:, m].conj()).real.sum(-1) / dim**0.5
            decay = log_gamma[:, m + 1 : n + 1].sum(1).exp()
            y[:, n] += (score * decay)[..., None] * v[:, m]
    if options.get("group_norm", True):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    y = y.flatten(2)
    if options.get("swish_gate", True):
        gate = mixer.get_submodule("g_proj")(x)
        y = y * gate * gate.sigmoid()
    out: Tensor = mixer.get_submodule("o_proj")(y)
    return out


def gammas(mixer: Mixer[Any], x: Tensor, gamma: str | float) -> Tensor:
    """log gamma [B, T, H], written out for each name."""
    shape = (*x.shape[:2], HEADS)
    h = torch.arange(HEADS, dtype=torch.float64)
    if gamma == "gated":
        logits = mixer.get_submodule("decay.gamma_proj")(x)
        return (torch.sigmoid(logits) ** (1 / 16)).log()
    if gamma == "learned":
        return mixer.get_parameter("decay.learned.gamma").sigmoid().log().expand(shape)
    if gamma == "eq8":
        return (1 - 2 ** (-5 - h)).log().expand(shape)
    if gamma == "paper_runs":
        spaced = torch.linspace(math.log(1 / 32), math.log(1 / 512), HEADS, dtype=torch.float64)
        return (1 - spaced.exp()).log().expand(shape)
    assert isinstance(gamma, float)
    return torch.full(shape, gamma, dtype=torch.float64).log()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": "paper_runs"},
        {"gamma": "learned"},
        {"gamma": "gated"},
        {"gamma": 1.0},
        {"gamma": 127 / 128, "value_expand": 1.0},
        {"rope": False, "swish_gate": False},
        {"group_norm": False, "value_expand": 0.5},
    ],
    ids=str,
)
def test_every_form_is_the_sum(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    spec = es.StackBuilder(WIDTH, HEADS).add("retnet", {**options, "chunk_size": 8}).spec()
    mixer = make_mixer(expand(spec)[0].mixer, spec).double()
    mixer.reset_parameters()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64) * 2
    with torch.no_grad():
        wanted = definition(mixer, x, options, gammas(mixer, x, options.get("gamma", "eq8")))
        close(mixer(x), wanted, 1e-12)
        close(mixer.parallel(x), wanted, 1e-12)
