"""Islands of precision: decays and recurrent states stay float32 whatever becomes of the model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import eulerstack as es
from eulerstack.layers.rope import make_rope, phases
from eulerstack.mixers import Retention
from eulerstack.segments import Segments
from eulerstack.spec import EmbeddingSpec
from eulerstack.testing import WIDTH, Contract

from .conftest import close, rms_ratio
from .contract.cases import MIXERS, contract, make

ISLANDS = ("A_log", "D", "dt_bias", "learned.gamma", "time.decay", "time.bonus", "learned.sinks", "correction.bias")
WIDE = ("kv", "ssm", "total", "weight", "top")  # what stays float32 of a state


LEARNED = "layer_templates.gated_retnet.mixer.retnet.gamma=learned"


def every(dtype: torch.dtype) -> es.Stack:
    """One layer of each mixer; what is kept in float32 is no number of the dtype."""
    torch.manual_seed(0)
    model = es.build(es.load("every_mixer_mini", [LEARNED]), dtype=dtype, kernels="torch")
    for name, tensor in model.state_dict().items():
        if name.endswith(ISLANDS):
            tensor.add_(1e-4)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_islands_survive_every_way_to_a_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    built, moved, loaded = every(dtype), every(torch.float32), every(dtype)
    values = {n: t.clone() for n, t in moved.state_dict().items() if n.endswith(ISLANDS)}
    assert {name for name in ISLANDS if any(n.endswith(name) for n in values)} == set(ISLANDS)
    moved.to(dtype)
    loaded.load_state_dict(moved.state_dict())
    es.save_checkpoint(moved, tmp_path / "kept")
    read = es.load_checkpoint(tmp_path / "kept", dtype=dtype)
    emptied = es.build(moved.spec, "meta", dtype).to_empty(device="cpu")
    emptied.load_state_dict(moved.state_dict(), assign=True)
    for model in (built, moved, loaded, read, emptied):
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (torch.float32 if name.endswith(ISLANDS) else dtype), name
    for model in (moved, loaded, read, emptied):
        for name, value in values.items():
            assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_positions_stay_apart_in_every_dtype(dtype: torch.dtype) -> None:
    """A bfloat16 knows no whole number between 256 and 258."""
    rope = make_rope(EmbeddingSpec(), 1 << 20, 64)
    cos, sin = phases(Segments.dense(3, start=torch.tensor([999_998])), rope, dtype)
    angle = torch.arange(999_998, 1_000_001).double()[:, None] * torch.tensor(rope.frequencies, dtype=torch.float64)
    close(torch.stack([cos, sin])[:, 0, :, 0].double(), torch.stack([angle.cos(), angle.sin()]), 1e-7)


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


@pytest.mark.parametrize(("mixer", "seed"), [("retnet", 78), ("retnet", 4000012), ("hyena_deep", 18)])
def test_bfloat16_is_near_float64_where_a_norm_divides_by_next_to_nothing(mixer: str, seed: int) -> None:
    """Weights and inputs that give one token's head a sum near 0: its sign, and the group norm's output, is rounding."""
    Contract(lambda dtype: make(mixer, dtype, seed)).bfloat16("parallel")


@pytest.mark.parametrize("first", [0, 40])
def test_bfloat16_is_far_where_many_tokens_are_off(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All by two hundredths, or the last 8 of 48 by five."""
    chunkwise = Retention.chunkwise

    def off(mixer: Retention, *call: object, **more: object) -> tuple[torch.Tensor, object]:
        y, state = chunkwise(mixer, *call, **more)  # type: ignore[arg-type]
        return torch.cat([y[:, :first], y[:, first:] * (1.05 if first else 1.02)], 1), state

    monkeypatch.setattr(Retention, "chunkwise", off)
    with pytest.raises(AssertionError, match="root mean square"):
        contract("retnet").bfloat16("chunkwise")


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
