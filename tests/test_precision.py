"""Islands of precision: decays and recurrent states stay float32 whatever becomes of the model."""

from collections.abc import Callable

import pytest
import torch

import eulerstack as es
from eulerstack.mixers import Retention
from eulerstack.segments import Segments
from eulerstack.testing import WIDTH

from .conftest import rms_ratio
from .contract.cases import MIXERS, contract, make

ISLANDS = ("A_log", "D", "dt_bias", "learned.gamma", "time.decay", "time.bonus")
WIDE = ("kv", "ssm", "total", "weight", "top")  # what stays float32 of a state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_islands_survive_every_way_to_a_dtype(build_mini: Callable[..., es.Stack], dtype: torch.dtype) -> None:
    built = build_mini(dtype)
    moved = build_mini(torch.float32)
    values = {n: p.clone() for n, p in moved.named_parameters() if n.endswith(ISLANDS)}
    moved.to(dtype)
    loaded = build_mini(dtype)
    loaded.load_state_dict(moved.state_dict())
    emptied = es.build(moved.spec, "meta", dtype).to_empty(device="cpu")
    for model in (built, moved, loaded, emptied):
        for name, weight in model.named_parameters():
            assert weight.dtype == (torch.float32 if name.endswith(ISLANDS) else dtype), name
    for model in (moved, loaded):
        for name, value in values.items():
            assert torch.equal(model.get_parameter(name), value), name


def test_float64_widens_the_islands(build_mini: Callable[..., es.Stack]) -> None:
    assert all(p.dtype == torch.float64 for p in build_mini(torch.float64).parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_recurrent_states_are_float32_in_a_bfloat16_model(mixer: str) -> None:
    module = make(mixer, torch.bfloat16)
    state = module.init_state(1, 8)
    for name, tensor in state.tensors().items():
        assert tensor.dtype == (torch.float32 if name.rpartition(".")[2] in WIDE else torch.bfloat16)
    x = torch.randn(1, 4, WIDTH, dtype=torch.bfloat16)
    after = module.chunkwise(x, state, Segments.dense(4))[1]
    assert {n: t.dtype for n, t in after.tensors().items()} == {n: t.dtype for n, t in state.tensors().items()}


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_is_near_float64(mixer: str, form: str) -> None:
    contract(mixer).bfloat16(form)


def test_autocast_leaves_decays_and_states_alone(build_mini: Callable[..., es.Stack]) -> None:
    model = build_mini(torch.float32, scale=1.0)
    tokens = torch.randint(0, 256, (2, 40))
    wanted = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model.chunkwise(tokens, model.init_state(2))
    assert rms_ratio(logits, wanted) < 3e-2
    assert state.layers[0].tensors()["ssm"].dtype == torch.float32
    assert state.layers[1].tensors()["kv"].dtype == torch.float32


def test_eight_heads_of_a_bfloat16_retnet_forget_at_eight_rates() -> None:
    """gamma = 1 - 2^-12 is 1 in bfloat16; what is left of a state after one token is not."""
    mixer = es.StackBuilder(d_model=32, n_heads=8).add("retnet").build(dtype=torch.bfloat16).blocks[0].mixer
    assert isinstance(mixer, Retention)
    state = mixer.init_state(1, 1).map(torch.ones_like)
    for form in (mixer.recurrent, mixer.chunkwise):
        _, after = form(torch.zeros(1, 1, 32, dtype=torch.bfloat16), state, Segments.dense(1))
        left = after.kv[0, :, 0, 0]
        assert left.unique().numel() == 8
        assert torch.allclose(left.double(), 1 - torch.exp2(-5.0 - torch.arange(8).double()), rtol=1e-7, atol=0)
