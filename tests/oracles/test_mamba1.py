"""Mamba-1 against transformers' mixer and mambapy's block with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulerstack as es
from eulerstack.mixers import Mixer, make_mixer
from eulerstack.segments import Segments
from eulerstack.spec import expand

from ..conftest import close

WIDTH, TOKENS = 48, 70
OPTIONS = [{}, {"d_state": 8, "expand": 3, "dt_rank": 7}]


def ours(options: dict[str, Any]) -> Mixer[Any]:
    torch.manual_seed(0)
    spec = es.StackBuilder(WIDTH, 4).add("mamba", {"variant": "mamba1", "chunk_size": 16, **options}).spec()
    mixer = make_mixer(expand(spec)[0].mixer, spec)
    mixer.reset_parameters()
    with torch.no_grad():
        mixer.get_parameter("scan.D").normal_()
        mixer.get_parameter("scan.A_log").add_(torch.randn_like(mixer.get_parameter("scan.A_log")))
        mixer.get_parameter("rank_proj.weight").mul_(8)
    return mixer


@torch.no_grad()
def copy(mixer: Mixer[Any], peer: nn.Module) -> None:
    """Both peers keep the layout of the paper's code."""
    weights = dict(mixer.named_parameters())
    pairs = {
        "in_proj.weight": torch.cat([weights["x_proj.weight"], weights["z_proj.weight"]]),
        "conv1d.weight": weights["x_conv.weight"][:, None],
        "conv1d.bias": weights["x_conv.bias"],
        "x_proj.weight": torch.cat([weights[f"{p}_proj.weight"] for p in ("rank", "B", "C")]),
        "dt_proj.weight": weights["dt_proj.weight"],
        "dt_proj.bias": weights["scan.dt_bias"],
        "A_log": weights["scan.A_log"],
        "D": weights["scan.D"],
        "out_proj.weight": weights["out_proj.weight"],
    }
    assert pairs.keys() == dict(peer.named_parameters()).keys()
    for name, value in pairs.items():
        peer.get_parameter(name).copy_(value)


@torch.no_grad()
def check(mixer: Mixer[Any], x: Tensor, wanted: Tensor) -> None:
    close(mixer(x), wanted, 1e-5)
    close(mixer.parallel(x), wanted, 1e-5)
    state, outs = mixer.init_state(len(x), TOKENS), []
    for t in range(TOKENS):
        y, state = mixer.recurrent(x[:, t : t + 1], state, Segments.dense(1, t))
        outs.append(y)
    close(torch.cat(outs, 1), wanted, 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_is_transformers(options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer, x = ours(options), torch.randn(2, TOKENS, WIDTH)
    config = MambaConfig(
        hidden_size=WIDTH,
        state_size=options.get("d_state", 16),
        expand=options.get("expand", 2),
        time_step_rank=options.get("dt_rank", "auto"),
    )
    peer = MambaMixer(config, 0).eval()
    copy(mixer, peer)
    with torch.no_grad():
        check(mixer, x, peer(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_gradients_are_mambapys(options: dict[str, Any]) -> None:
    mamba = pytest.importorskip("mambapy.mamba")
    mixer, x = ours(options), torch.randn(2, TOKENS, WIDTH)
    config = mamba.MambaConfig(
        d_model=WIDTH,
        n_layers=1,
        d_state=options.get("d_state", 16),
        expand_factor=options.get("expand", 2),
        dt_rank=options.get("dt_rank", "auto"),
    )
    peer = mamba.MambaBlock(config)
    copy(mixer, peer)
    check(mixer, x, peer(x).detach())
    names = ("A_log", "D", "dt_proj.weight", "out_proj.weight")
    wanted = torch.autograd.grad(peer(x).square().sum(), [peer.get_parameter(n) for n in names])
    mine = [mixer.get_parameter(n if n.endswith("weight") else f"scan.{n}") for n in names]
    for got, grad in zip(torch.autograd.grad(mixer(x).square().sum(), mine), wanted, strict=True):
        close(got, grad, 2e-5)
