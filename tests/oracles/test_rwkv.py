"""RWKV-4's time mixing against transformers' with the same weights."""

import pytest
import torch
from torch import Tensor

import eulerstack as es
from eulerstack.mixers import make_mixer
from eulerstack.segments import Segments
from eulerstack.spec import expand

from ..conftest import close

pytest.importorskip("transformers")

WIDTH, TOKENS = 48, 70
NAMES = {
    "time_decay": "time.decay",
    "time_first": "time.bonus",
    "time_mix_key": "mix_k",
    "time_mix_value": "mix_v",
    "time_mix_receptance": "mix_r",
    "key.weight": "k_proj.weight",
    "value.weight": "v_proj.weight",
    "receptance.weight": "r_proj.weight",
    "output.weight": "o_proj.weight",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_forward_state_and_gradients_are_transformers(scale: float) -> None:
    """In float64, of which transformers rounds the keys alone to float32: gradients of large keys' decays cancel."""
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    torch.manual_seed(0)
    spec = es.StackBuilder(WIDTH, 4).add("rwkv").spec()
    mixer = make_mixer(expand(spec)[0].mixer, spec).double()
    mixer.reset_parameters()
    peer = RwkvSelfAttention(RwkvConfig(hidden_size=WIDTH, attention_hidden_size=WIDTH)).double()
    with torch.no_grad():
        mixer.get_parameter("k_proj.weight").mul_(scale)
        for theirs, ours in NAMES.items():
            weight = peer.get_parameter(theirs)
            weight.copy_(mixer.get_parameter(ours).reshape(weight.shape))
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    wanted, _ = peer(x)
    for y in (mixer(x), mixer.parallel(x), _steps(mixer, x)):
        close(y, wanted, 1e-5)
    theirs = torch.autograd.grad(wanted.square().sum(), [peer.get_parameter(n) for n in NAMES])
    ours = torch.autograd.grad(mixer(x).square().sum(), [mixer.get_parameter(n) for n in NAMES.values()])
    for got, grad in zip(ours, theirs, strict=True):
        close(got.reshape(grad.shape), grad, 1e-5)


def _steps(mixer, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    state, outs = mixer.init_state(len(x), TOKENS, dtype=x.dtype), []
    for t in range(TOKENS):
        y, state = mixer.recurrent(x[:, t : t + 1], state, Segments.dense(1, t))
        outs.append(y)
    return torch.cat(outs, 1)
