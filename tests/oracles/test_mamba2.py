"""Mamba-2 against transformers' mixer with the same weights."""

from typing import Any

import pytest
import torch

import eulerstack as es
from eulerstack.mixers import make_mixer
from eulerstack.segments import Segments
from eulerstack.spec import expand

from ..conftest import close

pytest.importorskip("transformers")

WIDTH, TOKENS = 48, 70


@pytest.mark.parametrize(
    "options",
    [
        {"d_state": 16, "head_dim": 8},
        {"d_state": 8, "head_dim": 16, "n_groups": 3, "d_conv": 3},
        {"d_state": 256, "head_dim": 32, "expand": 4, "n_groups": 2},
    ],
    ids=str,
)
def test_forward_is_transformers(options: dict[str, Any]) -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    spec = es.StackBuilder(WIDTH, 4).add("mamba", {**options, "chunk_size": 16}).spec()
    mixer = make_mixer(expand(spec)[0].mixer, spec)
    mixer.reset_parameters()
    with torch.no_grad():
        mixer.get_parameter("norm.weight").normal_()
        mixer.get_parameter("scan.D").normal_()
    inner = options.get("expand", 2) * WIDTH
    config = Mamba2Config(
        hidden_size=WIDTH,
        state_size=options["d_state"],
        head_dim=options["head_dim"],
        num_heads=inner // options["head_dim"],
        n_groups=options.get("n_groups", 1),
        conv_kernel=options.get("d_conv", 4),
        expand=options.get("expand", 2),
        chunk_size=32,
        layer_norm_epsilon=1e-6,
    )
    peer = Mamba2Mixer(config, 0).eval()
    weights = dict(mixer.named_parameters())
    with torch.no_grad():
        peer.in_proj.weight.copy_(torch.cat([weights[f"{p}_proj.weight"] for p in ("z", "x", "B", "C", "dt")]))
        peer.conv1d.weight.copy_(torch.cat([weights[f"{p}_conv.weight"] for p in "xBC"])[:, None])
        peer.conv1d.bias.copy_(torch.cat([weights[f"{p}_conv.bias"] for p in "xBC"]))
        for name in ("A_log", "D", "dt_bias"):
            peer.get_parameter(name).copy_(weights[f"scan.{name}"])
        peer.norm.weight.copy_(weights["norm.weight"])
        peer.out_proj.weight.copy_(weights["out_proj.weight"])
        x = torch.randn(2, TOKENS, WIDTH)
        wanted = peer(x)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        close(mixer(x), wanted, 1e-5)
        close(mixer.parallel(x), wanted, 1e-5)
        state, outs = mixer.init_state(2, TOKENS), []
        for t in range(TOKENS):
            y, state = mixer.recurrent(x[:, t : t + 1], state, Segments.dense(1, t))
            outs.append(y)
        close(torch.cat(outs, 1), wanted, 1e-5)
