"""muP: nothing changes at the base's width, and beyond it a step moves a stack as far as at the base."""

from typing import Any

import pytest
import torch
from torch import Tensor

import eulerstack as es
from eulerstack.spec import with_hints
from eulerstack.training.optim import EPS, make_optimizer

from ..conftest import close

EVERY = "every_mixer_mini"


def built(name: str, *settings: str, **hints: Any) -> es.Stack:
    torch.manual_seed(0)
    return es.build(with_hints(es.load(name, settings), hints), dtype=torch.float64, kernels="torch")


def groups(model: es.Stack) -> tuple[dict[str, tuple[float, float]], set[float]]:
    """The learning rate and decay of each parameter by name, and the epsilons."""
    made = make_optimizer(model.named_parameters(), model.spec.training_hints, mup=model.mup)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
    return found, {g["eps"] for g in made.param_groups}


@pytest.mark.parametrize("hints", [{}, {"init": "normal"}, {"optimizer": "hybrid"}], ids=str)
def test_nothing_changes_at_the_bases_width(hints: dict[str, Any]) -> None:
    plain, base = built(EVERY, **hints), built(EVERY, "model.mup.d_model=128", **hints)
    assert all(map(torch.equal, plain.parameters(), base.parameters()))
    tokens = torch.arange(40)[None]
    assert torch.equal(plain(tokens), base(tokens))
    assert groups(plain) == groups(base)


def test_learning_rates_fall_with_what_a_weight_sums_over() -> None:
    wide = built(EVERY, "model.d_model=256", "model.mup.d_model=128", lr_peak=0.01, weight_decay=0.1)
    found, epsilons = groups(wide)
    halved = {name for name, (lr, _) in found.items() if lr == pytest.approx(0.005)}
    assert {name for name in found if name.endswith(("q_proj.weight", "down_proj.weight", "B_proj.weight"))} <= halved
    assert {lr for name, (lr, _) in found.items() if name not in halved} == {0.01}
    kept = ("embedding.weight", "norm.weight", "conv.weight", "bias", "A_log", "skip", "filter.out_proj.weight")
    assert not {name for name in halved if name.endswith(kept)}
    assert all(lr * decay == pytest.approx(0.001) for lr, decay in found.values() if decay)
    assert epsilons == {EPS / 2}


def test_groups_multiply_what_mup_gives() -> None:
    entry = {"match": "layers.7.*", "lr_multiplier": 3.0, "weight_decay": 0.5}
    settings = ("model.d_model=256", "model.mup.d_model=128")
    found, _ = groups(built(EVERY, *settings, lr_peak=0.01, router_lr_multiplier=0.1, optimizer_groups=[entry]))
    assert found["layers.7.mixer.q_proj.weight"] == pytest.approx((0.015, 1.0))
    assert found["layers.7.ffn.router_proj.weight"] == pytest.approx((0.0015, 1.0))
    assert found["layers.6.mixer.q_proj.weight"][0] == pytest.approx(0.005)


@pytest.mark.parametrize("init", ["mixer", "normal"])
def test_weights_start_as_small_as_what_they_sum_over_asks(init: str) -> None:
    base, wide = (built(EVERY, f"model.d_model={n}", "model.mup.d_model=128", init=init) for n in (128, 256))

    def shrunk(name: str) -> float:
        """The deviation at the base over that at twice its width."""
        return float(base.get_parameter(name).detach().std() / wide.get_parameter(name).detach().std())

    assert shrunk("embedding.weight") == pytest.approx(1, rel=0.02)
    for name in ("layers.7.mixer.o_proj", "layers.7.ffn.experts.down_proj", "layers.1.mixer.x_proj"):
        assert shrunk(f"{name}.weight") == pytest.approx(2**0.5, rel=0.03), name
    for name in ("layers.7.ffn.router_proj", "layers.1.mixer.B_proj", "layers.5.mixer.decay.gamma_proj"):
        assert shrunk(f"{name}.weight") == pytest.approx(2, rel=0.1), name


def test_the_scales_are_the_stacks_in_every_form_and_after_a_checkpoint(tmp_path: Any) -> None:
    model = built("arch_expert_research_mini", "model.d_model=128", "model.mup.d_model=32", "model.mup.n_heads=2")
    assert model.mup.shrunk == 0.25
    tokens = torch.randint(0, 256, (2, 20))
    wanted = model(tokens)
    logits, state = model.chunkwise(tokens[:, :-1], model.init_state(2, 32))
    last, _ = model.recurrent(tokens[:, -1:], state)
    close(torch.cat([logits, last], 1), wanted, 1e-12)
    es.save_checkpoint(model, tmp_path / "kept")
    close(es.load_checkpoint(tmp_path / "kept", dtype=torch.float64)(tokens), wanted, 1e-12)
    plain = built("arch_expert_research_mini", "model.d_model=128")
    plain.load_state_dict(model.state_dict())
    assert (plain(tokens) - wanted).abs().max() > 1e-3


def test_a_part_drawn_at_a_time_is_drawn_as_the_whole() -> None:
    """As stacks are that are sharded."""
    whole = built(EVERY, "model.d_model=256", "model.mup.d_model=128")
    parts = es.build(whole.spec, "meta", torch.float64, kernels="torch")
    torch.manual_seed(0)
    for part, draw in list(parts.drawing()):
        part.to_empty(device="cpu")
        with torch.no_grad():
            draw()
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))


SHAPES = {
    "attention": {"type": "attention", "attention": {"qk_norm": True}},
    "latent": {"type": "attention", "attention": {"latent_dim": 16}},
    "retnet": {"type": "retnet"},
    "no norm": {"type": "retnet", "retnet": {"group_norm": False}},
}


def moved(mixer: dict[str, Any], width: int, base: int | None, optimizer: str) -> float:
    """How far a few steps move the logits, root mean square."""
    torch.manual_seed(0)
    hints = {"optimizer": optimizer, "lr_peak": 0.01, "weight_decay": 0.0}
    builder = es.StackBuilder(width, 4, max_seq_len=64, mlp_ratio=1.0, training_hints=hints)
    builder.set(model={"mup": base and {"d_model": base}}).template("t", mixer, ffn="gated_mlp").layers("t", 2)
    model = builder.build(kernels="torch")
    tokens = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(1))
    made = make_optimizer(model.named_parameters(), model.spec.training_hints, mup=model.mup)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(tokens[:, :-1])

    before = logits()
    for _ in range(5):
        made.zero_grad()
        model.losses(tokens[:, :-1], tokens[:, 1:])[0].backward()
        made.step()
    return float((logits() - before).square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_move_the_logits_as_far_at_every_width(shape: str) -> None:
    """The coordinate check of the paper's appendix D.1."""
    base, wide = (moved(SHAPES[shape], width, 64, "adamw") for width in (64, 256))
    assert 0.75 * base < wide < 1.25 * base
    assert moved(SHAPES[shape], 256, None, "adamw") > 1.6 * base


def test_steps_of_muon_do_so_too() -> None:
    base, wide = (moved(SHAPES["attention"], width, 32, "hybrid") for width in (32, 64))
    assert 0.75 * base < wide < 1.25 * base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.mup.d_model=130"],
            r"model.mup: d_model = 130 with 4 heads cannot be built: model.n_heads: 4 does not",
        ),
        (["model.mup.d_model=64", "model.mup.n_heads=1"], r"1 heads leave no whole number of the 2 kv heads that 4"),
        (["model.mup.d_model=64", "training_hints.optimizer=muon"], r"hints.optimizer: muon also trains the embedding"),
        (["model.mup={}"], r"d_model"),
        (["model.mup.d_model=0"], r"model.mup.d_model"),
    ],
)
def test_a_base_that_cannot_be_built_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(es.SpecError, match=message):
        es.load("arch_expert_research_mini", settings)
