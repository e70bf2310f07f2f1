"""Every training hint acts: in the weights, the loss, the memory, the optimizer or the schedule; or it is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import eulerstack as es
from eulerstack.groups import decays
from eulerstack.layers.precision import FullPrecision
from eulerstack.layers.selective import ATTENTION, PRODUCTS, kept
from eulerstack.spec import TrainingHints, hint_places, with_hints
from eulerstack.training.module import StackModule
from eulerstack.training.optim import make_optimizer, make_schedule
from eulerstack.training.settings import table

from ..conftest import close

FILE = """
schema_version: 1
model: {name: t, d_model: 32, n_heads: 4, vocab_size: 256, max_seq_len: 64, mlp_ratio: 1.0}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  m1: {mixer: {type: mamba, mamba: {variant: mamba1, d_state: 4}}, ffn: {type: none}}
  m2: {mixer: {type: mamba, mamba: {d_state: 8, head_dim: 8}}, ffn: {type: mlp}}
  r: {mixer: {type: retnet}, ffn: {type: moe, moe: {experts: 4, top_k: 2}}}
  a: {mixer: {type: attention%s}, ffn: {type: gated_mlp}}
  l: {mixer: {type: attention, attention: {latent_dim: 16%s}}, ffn: {type: gated_mlp}}
  k: {mixer: {type: linear_attention}, ffn: {type: none}}
  w: {mixer: {type: rwkv}, ffn: {type: none}}
  h: {mixer: {type: hyena}, ffn: {type: none}}
layer_schedule: [{pattern: m1 m2 r a l k w h}]
head: {type: causal_lm}
training_hints: {%s}
"""


def spec(hints: str = "", attention: str = "", latent: str = "") -> es.StackSpec:
    return es.loads(FILE % (attention, latent, hints))


def stack(*texts: str) -> es.Stack:
    torch.manual_seed(0)
    return es.build(spec(*texts), dtype=torch.float64)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    text = torch.randint(0, 256, (2, 25))
    return text[:, :-1], text[:, 1:]


def loss(model: es.Stack, seed: int = 2) -> Tensor:
    tokens, targets = batch()
    torch.manual_seed(seed)
    return model.losses(tokens, targets)[0]


DROPS = {
    "dropout": ("dropout: 0.5",),
    "attn_drop": ("", ", attention: {attn_drop: 0.5}"),
    "latent": ("", "", ", attn_drop: 0.5"),
}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_acts_in_training_and_only_there(name: str) -> None:
    dropped, plain = stack(*DROPS[name]), stack()
    assert loss(dropped).item() != loss(plain).item()
    assert loss(dropped).item() == loss(dropped).item()
    assert loss(dropped, 3).item() != loss(dropped).item()
    assert loss(dropped.eval()).item() == loss(plain.eval()).item()
    tokens = batch()[0]
    close(dropped.chunkwise(tokens, dropped.init_state(2, 24))[0], dropped(tokens), 1e-12)


def test_an_entry_may_drop_more_of_its_attention() -> None:
    text = FILE % ("", "", "")
    changed = text.replace("r a l", "r").replace(
        "k w h}]", "k w h}, {template: a, override: {attention: {attn_drop: 0.5}}}, {template: l}]"
    )
    model, tokens = es.build(es.loads(changed), dtype=torch.float64), batch()[0]
    assert model(tokens).ne(model(tokens)).any()
    assert model.eval()(tokens).eq(model(tokens)).all()


class Kept:
    """Counts the elements that autograd keeps."""

    def __init__(self) -> None:
        self.elements = 0

    def note(self, tensor: Tensor) -> Tensor:
        self.elements += tensor.numel()
        return tensor


AHEAD = "{type: causal_lm_mtp, mtp: {head_template: r, n_predict: 2}}"
SIDE = "{type: branched, branched: {branches: {n: {type: attention}, f: {type: mamba, mamba: {head_dim: 8}}}}}"
SHAPED = {
    "mixers": FILE,
    "ahead": FILE.replace("{type: causal_lm}", AHEAD),
    "shared": FILE.replace("{type: hyena}", SIDE).replace("k w h}]", "k w}, {template: h, repeat: 2, shared: s}]"),
}


@pytest.mark.parametrize("dropout", ["", ", dropout: 0.3"])
@pytest.mark.parametrize("shape", SHAPED)
def test_checkpointing_keeps_less_and_changes_no_gradient(shape: str, dropout: str) -> None:
    found, kept = [], []
    for policy in ("none", "selective", "block"):
        torch.manual_seed(0)
        text = SHAPED[shape] % ("", "", f"checkpointing: {policy}{dropout}")
        model, count = es.build(es.loads(text), dtype=torch.float64), Kept()
        with torch.autograd.graph.saved_tensors_hooks(count.note, lambda t: t):
            total = loss(model)
        kept.append(count.elements)
        found.append([total, *torch.autograd.grad(total, list(model.parameters()), allow_unused=True)])
    for plain, *again in zip(*found, strict=True):
        for other in again:
            assert (plain is None) == (other is None)
            assert plain is None or torch.equal(plain, other)
    assert max(kept[1:]) < kept[0] / 3  # what selective keeps of products is not autograd's: see test_memory.py


class Calls(TorchDispatchMode):
    """Counts products by weights, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in PRODUCTS | ATTENTION
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", SHAPED)
def test_selective_runs_no_product_and_no_attention_again(shape: str) -> None:
    counts = []
    for policy in ("none", "selective", "block"):
        torch.manual_seed(0)
        model = es.build(es.loads(SHAPED[shape] % ("", "", f"checkpointing: {policy}")), dtype=torch.float64)
        with Calls() as calls:
            loss(model).backward()
        counts.append(calls.count)
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_attention_that_draws_is_drawn_again(drop: float) -> None:
    """A GPU's draws inside the kernel; kept, what draws behind it would see other numbers than in the forward."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.zeros(1, 1, 1, 8)
    assert kept(flash, (q, q, q, drop, True), {"scale": 1.0}) == (drop == 0)
    assert kept(flash, (q, q, q), {"dropout_p": drop}) == (drop == 0)


def test_normal_weights_are_of_one_scale_and_leave_alone_what_papers_set() -> None:
    normal, papers = stack("init: normal"), stack()
    for (name, weight), (_, other) in zip(normal.named_parameters(), papers.named_parameters(), strict=True):
        if name.endswith(("q_proj.weight", "x_proj.weight", "up_proj.weight")):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert other.std().item() != pytest.approx(0.02, rel=0.1)
        if name.endswith(("A_log", "dt_bias")) or "filter" in name:
            assert torch.allclose(weight.mean(), other.mean(), rtol=0.5, atol=0.3)


def test_routers_without_a_coefficient_of_their_own_take_the_shared_one() -> None:
    parts = [stack(hints).losses(*batch())[1]["load_balance"].item() for hints in ("", "router_aux_loss_coef: 0.03")]
    assert parts[1] == pytest.approx(3 * parts[0])


def optimizer(hints: str) -> tuple[torch.optim.Optimizer, dict[str, dict[str, Any]]]:
    """The optimizer, and the group of each parameter by name."""
    model = stack(hints)
    made = make_optimizer(model.named_parameters(), model.spec.training_hints)
    names = {id(p): name for name, p in model.named_parameters()}
    return made, {names[id(p)]: group for group in made.param_groups for p in group["params"]}


def test_adamw_by_default() -> None:
    made, groups = optimizer("lr_peak: 0.01, weight_decay: 0.2, betas: [0.8, 0.9]")
    assert isinstance(made, torch.optim.AdamW)
    assert {group["lr"] for group in groups.values()} == {0.01}
    assert {group["betas"] for group in groups.values()} == {(0.8, 0.9)}
    assert {name.rpartition(".")[2] for name, g in groups.items() if g["weight_decay"] == 0} >= {"A_log", "D", "bias"}
    assert groups["embedding.weight"]["weight_decay"] == 0.2


@pytest.mark.parametrize("kind", ["hybrid", "muon"])
def test_muon_takes_matrices_and_adamw_the_rest(kind: str) -> None:
    _, groups = optimizer(f"optimizer: {kind}, lr_peak: 0.01, muon: {{lr: 0.05, momentum: 0.9, weight_decay: 0.3}}")
    muon = {name for name, group in groups.items() if "momentum" in group}
    assert groups["layers.3.mixer.q_proj.weight"]["lr"] == 0.05
    assert ("embedding.weight" in muon) == ("layers.2.ffn.router_proj.weight" in muon) == (kind == "muon")
    assert not any(name.endswith(("bias", "A_log", "D")) or "norm" in name for name in muon)
    assert not any("conv" in name or "experts" in name for name in muon)  # kernels of a channel each; stacked
    assert {name for name in groups if name.endswith("o_proj.weight")} <= muon


def test_what_is_kept_in_float32_never_decays() -> None:
    model = es.build(es.load("every_mixer_mini"), "meta")
    rooms = [room for room in model.modules() if isinstance(room, FullPrecision)]
    apart = {id(p) for room in rooms for p in room.parameters()}
    assert len(apart) > 5
    assert not [name for name, p in model.named_parameters() if id(p) in apart and decays(name)]


@pytest.mark.parametrize("kind", ["adamw", "hybrid", "muon"])
def test_every_optimizer_learns_and_resumes_to_the_bit(kind: str) -> None:
    def steps(model: es.Stack, made: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            made.zero_grad()
            total = loss(model)
            total.backward()
            made.step()
            losses.append(total.item())
        return losses

    def fresh() -> tuple[es.Stack, torch.optim.Optimizer]:
        model = stack(f"optimizer: {kind}")
        return model, make_optimizer(model.named_parameters(), model.spec.training_hints)

    straight = steps(*fresh(), 8)
    assert straight[-1] < straight[0] - 0.3
    model, made = fresh()
    first = steps(model, made, 4)
    again, other = fresh()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(made.state_dict())
    assert first + steps(again, other, 4) == straight


def test_groups_by_name_and_routers_by_their_multiplier() -> None:
    hints = "lr_peak: 0.01, router_lr_multiplier: 0.1, optimizer_groups: [%s, %s]"
    first = "{match: layers.3.*, lr_multiplier: 0.5, weight_decay: 0.7}"
    _, groups = optimizer(hints % (first, "{match: '*.mixer.*', lr_multiplier: 2.0}"))
    assert groups["layers.3.mixer.q_proj.weight"]["lr"] == pytest.approx(0.005)
    assert groups["layers.3.mixer.q_proj.weight"]["weight_decay"] == 0.7
    assert groups["layers.3.mixer_norm.weight"]["weight_decay"] == 0
    assert groups["layers.2.mixer.q_proj.weight"]["lr"] == pytest.approx(0.02)
    assert groups["layers.2.ffn.router_proj.weight"]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "nothing.*", "lr_multiplier": 2.0}], "matches no parameter; some names are"),
        (
            [{"match": "*", "lr_multiplier": 2.0}, {"match": "head*", "lr_multiplier": 2.0}],
            "1.match = 'head\\*' matches no",
        ),
        ([{"match": "*", "lr_multiplier": 2.0}, {"match": "emb*", "lr_multiplier": 2.0}], "an entry before it has all"),
        ([{"match": "*.bias", "weight_decay": 0.5}], "matches only norms, biases and decays"),
    ],
)
def test_groups_that_change_nothing_are_refused_when_the_stack_is_built(groups: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackModule(spec(), optimizer_groups=groups)
    with pytest.raises(ValueError, match=message):
        es.build(with_hints(spec(), {"optimizer_groups": groups}), "meta")


SHAPES = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
}


@pytest.mark.parametrize("name", SHAPES)
def test_learning_rates_rise_and_fall(name: str) -> None:
    floor = "" if name == "constant" else ", lr_floor_ratio: 0.25"
    rates = rated(f"schedule: {name}, warmup_steps_ratio: 0.1, lr_peak: 2.0{floor}")
    assert rates[0] == pytest.approx(0.2)
    assert rates[10] == max(rates) == pytest.approx(2.0)
    for step in (30, 55, 100):
        assert rates[step] == pytest.approx(0.5 + 1.5 * SHAPES[name]((step - 10) / 90))


def test_wsd_is_flat_and_falls_at_the_end() -> None:
    rates = rated("schedule: wsd, warmup_steps_ratio: 0.1, decay_steps_ratio: 0.3, lr_peak: 2.0, lr_floor_ratio: 0.25")
    assert set(rates[10:71]) == {2.0}
    assert rates[85] == pytest.approx(0.5 + 1.5 * 0.5)
    assert rates[100] == pytest.approx(0.5)


def rated(hints: str) -> list[float]:
    """The learning rate of 100 steps, and that after them."""
    made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = make_schedule(made, 100, spec(hints).training_hints), []
    for _ in range(100):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    return [*rates, made.param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ("dropout: 1.0", "training_hints.dropout: 1 is not less than 1|dropout: 1.0 is not less than 1"),
        ("muon: {lr: 0.1}", "the optimizer is adamw, so it would do nothing"),
        ("decay_steps_ratio: 0.1", "it is the schedule wsd's"),
        ("schedule: constant, lr_floor_ratio: 0.1", "falls to no floor"),
        ("schedule: wsd, warmup_steps_ratio: 0.6, decay_steps_ratio: 0.6", "more than there are"),
        ("optimizer_groups: [{match: '*'}]", "neither lr_multiplier nor weight_decay"),
        ("optimizer: sgd", "'sgd' is not one of adamw, hybrid, muon"),
        ("checkpointing: true", "true is not one of none, selective, block"),
    ],
)
def test_hints_that_mean_nothing_are_refused(hints: str, message: str) -> None:
    with pytest.raises(es.SpecError, match=message):
        spec(hints)


def test_hints_of_experts_need_experts() -> None:
    text = (FILE % ("", "", "router_lr_multiplier: 0.5")).replace("type: moe, moe: {experts: 4, top_k: 2}", "type: mlp")
    with pytest.raises(es.SpecError, match="no layer has a mixture of experts"):
        es.loads(text)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "hybrid"}, {"schedule": "wsd"}, {"schedule": "constant"}])
def test_any_recipe_is_dumped_and_loads_equal(changes: dict[str, Any]) -> None:
    changed = with_hints(spec("dropout: 0.1"), changes)
    assert es.loads(es.dump(changed)) == changed
    assert changed.training_hints == TrainingHints(**{"dropout": 0.1, **changes})


def test_the_table_says_where_each_setting_comes_from(tmp_path: Path) -> None:
    hints = "lr_peak: 0.01, dropout: 0.1,\n  optimizer: muon, muon: {momentum: 0.9}, schedule: linear"
    file = tmp_path / "t.yml"
    file.write_text(FILE % ("", "", hints))
    module = StackModule(file, dropout=0.2, optimizer="hybrid", muon={"lr": 0.01})
    lines = table(module.spec, hint_places(file), module.changes, {"seed": 7}).splitlines()
    found = {words[0]: (words[1], " ".join(words[2:])) for words in map(str.split, lines)}
    line = 1 + FILE[: FILE.index("training_hints")].count("\n")
    assert found["lr_peak"] == ("0.01", f"training_hints, {file}:{line}")
    assert found["schedule"] == ("linear", f"training_hints, {file}:{line + 1}")
    assert found["muon.momentum"] == ("0.9", f"training_hints, {file}:{line + 1}")
    assert found["muon.lr"] == ("0.01", "command line")
    assert found["optimizer"] == ("hybrid", "command line")
    assert found["dropout"] == ("0.2", "command line")
    assert found["seed"] == ("7", "command line")
    assert found["weight_decay"] == ("0.1", "default")
    assert found["muon.ns_steps"] == ("5", "default")
    assert "decay_steps_ratio" not in found  # linear has none


def test_fit_prints_the_table(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    from .test_cli import eulerstack, fit_words

    words = [*fit_words(stack_file, corpus, "run", 2), "--model.dropout", "0.1", "--model.muon.lr", "0.01"]
    done = eulerstack(*words, "--model.optimizer", "hybrid", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert any(line.split()[:3] == ["dropout", "0.1", "command"] for line in done.stdout.splitlines())
    assert any(line.split()[:2] == ["muon.lr", "0.01"] for line in done.stdout.splitlines())
