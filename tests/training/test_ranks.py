"""Two ranks, and four, compute what one process does: DDP, FSDP2, tensor parallelism and both, for every mixer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eulerstack.checkpoint import save_checkpoint
from eulerstack.layers.share import Share
from eulerstack.mixers import Mixer, Retention
from eulerstack.model import build
from eulerstack.spec import from_data

MLP = {"type": "mlp", "activation": "gelu", "bias": True}
GATED = {"type": "gated_mlp", "bias": True}
MOE = {"type": "moe", "mlp_ratio": 0.5, "moe": {"experts": 4, "top_k": 2, "shared_experts": 1, "z_loss": 0.01}}
BALANCED = {
    "type": "moe",
    "mlp_ratio": 0.5,
    "moe": {"experts": 4, "bias_correction": {"enabled": True}, "router": "sigmoid"},
}
SMALL = {"d_state": 8, "head_dim": 8, "chunk_size": 16}


def attention(**keys: Any) -> dict[str, Any]:
    return {"type": "attention", "attention": keys}


def mamba(**keys: Any) -> dict[str, Any]:
    return {"type": "mamba", "mamba": keys}


def retnet(**keys: Any) -> dict[str, Any]:
    return {"type": "retnet", "retnet": {"chunk_size": 16, **keys}}


LAYERS: dict[str, dict[str, Any]] = {
    "attention": {"mixer": attention(qkv_bias=True, qk_norm=True), "ffn": MLP},
    "sinks": {"mixer": attention(window=9, attention_sinks={"n_per_head": 2}), "ffn": GATED},
    "latent": {"mixer": attention(latent_dim=12, rope_head_dim=4), "ffn": GATED, "norm": {"position": "sandwich"}},
    "retnet": {"mixer": retnet(), "ffn": GATED, "residual": {"type": "parallel"}},
    "gated_retnet": {"mixer": retnet(gamma="gated"), "ffn": MOE},
    "learned_retnet": {"mixer": retnet(gamma="learned", group_norm=False), "ffn": {"type": "none"}},
    "linear": {"mixer": {"type": "linear_attention"}, "ffn": BALANCED},
    "mamba1": {"mixer": mamba(variant="mamba1"), "ffn": {"type": "none"}},
    "mamba2": {"mixer": mamba(**SMALL), "ffn": {"type": "none"}},
    "mamba2_groups": {
        "mixer": mamba(**SMALL, n_groups=2),
        "ffn": GATED,
        "norm": {"type": "layernorm", "position": "post"},
    },
    "rwkv": {"mixer": {"type": "rwkv", "rwkv": {"chunk_size": 8}}, "ffn": {"type": "mlp", "activation": "relu2"}},
    "hyena": {"mixer": {"type": "hyena", "hyena": {"depth": 2, "filter_hidden": 16}}, "ffn": GATED},
    "branched": {
        "mixer": {
            "type": "branched",
            "branched": {
                "branches": {"a": attention(), "m": mamba(**SMALL)},
                "selector": {"type": "learned_gate"},
            },
        },
        "ffn": GATED,
    },
}


def stack(*layers: str, **blocks: Any) -> dict[str, Any]:
    model = {"name": "ranks", "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 256, "max_seq_len": 64}
    return {
        "schema_version": 1,
        "model": {**model, "mlp_ratio": 1.0, **blocks.pop("model", {})},
        "tokenizer_contract": {"type": "byte"},
        "embedding": {"type": "learned"},
        "layer_templates": {name: LAYERS[name] for name in layers},
        "layer_schedule": [{"template": name} for name in layers],
        "head": {"type": "causal_lm"},
        **blocks,
    }


WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "tensor": {"strategy": "fsdp2", "tensor": 2},
}


def launched(folder: Path, cases: list[dict[str, Any]], ranks: int) -> dict[str, dict[str, Any]]:
    """What each case found, on that many ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]  # on a port that it finds free
        command += [f"--nproc_per_node={ranks}", "-m"]
    done = subprocess.run(
        [*command, "tests.training.ranks", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {case["name"]: torch.load(folder / f"{case['name']}.pt") for case in cases}


def same(one: dict[str, Any], many: dict[str, Any], bound: float, weights: float | None = None) -> None:
    assert len(one["losses"]) == len(many["losses"]) > 0
    assert one["losses"] == pytest.approx(many["losses"], rel=bound, abs=bound)
    assert one["groups"] == many["groups"]
    assert one["dtypes"] == many["dtypes"]
    for name, grad in (one["grads"] or {}).items():
        assert torch.allclose(grad, many["grads"][name], rtol=0, atol=bound * grad.abs().max().item() + 1e-30), name
    for name, weight in one["weights"].items():
        atol = (weights or bound) * weight.abs().max().item() + 1e-30
        assert torch.allclose(weight, many["weights"][name], rtol=0, atol=atol), name


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    """Every mixer and channel mixer in a stack, accumulated, clipped, stopped and resumed."""
    every = stack(
        *LAYERS,
        embedding={"type": "learned", "tie_word_embeddings": True},
        head={"type": "causal_lm_mtp", "mtp": {"n_predict": 1, "head_template": "gated_retnet"}},
        training_hints={"z_loss": 1e-3, "grad_clip": 0.5},
    )
    case = {"spec": every, "steps": 2, "accumulate": 2, "strategy": "auto"}
    one = launched(tmp_path / "one", [{**case, "name": "one", "steps": 3}], 1)["one"]
    cases = []
    for name, way in WAYS.items():
        cases.append({**case, **way, "name": name, "save": f"{name}.ckpt"})
        cases.append({**case, **way, "name": f"{name}-on", "steps": 3, "resume": f"{name}.ckpt", "gradients": False})
    found = launched(tmp_path / "two", cases, 2)
    layers, steps, heads = len(LAYERS), 2, 2  # one more for the modules that look ahead, one for what is no layer
    assert found["fsdp2"]["reductions"] == steps * (layers + heads), "once an optimizer step, not once a batch"
    for name in WAYS:
        first, rest = found[name], found[f"{name}-on"]
        whole = {**rest, "losses": first["losses"] + rest["losses"], "grads": first["grads"]}
        same(one, whole, 1e-9)


@pytest.mark.parametrize(
    ("layer", "model", "of", "what"),
    [
        ("attention", {}, 3, r"layer 0 \(attention\): model\.n_heads = 4 cannot be split over 3 ranks"),
        ("attention", {}, 4, r"model\.n_kv_heads = 2 cannot be split over 4"),
        ("mamba2_groups", {}, 4, r"mamba\.n_groups = 2 cannot be split over 4"),
        ("rwkv", {"d_model": 36, "mlp_ratio": 1.5}, 4, "hidden width of an ffn, .* = 54 cannot be split over 4"),
    ],
)
def test_what_does_not_divide_is_refused(layer: str, model: dict[str, Any], of: int, what: str) -> None:
    block = build(from_data(stack(layer, model=model), "case"), "meta").blocks[0]
    with pytest.raises(ValueError, match=what):
        block.split(Share(0, of))


def test_a_mixer_without_a_plan_is_refused() -> None:
    class Plain(Retention):
        split = Mixer.split

    mixer = object.__new__(Plain)
    with pytest.raises(ValueError, match="Plain has no plan for tensor parallelism; train it with tensor_parallel 1"):
        mixer.split(Share(0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_every_mixer_in_twenty_steps(layer: str, tmp_path: Path) -> None:
    case = {"spec": stack(layer, "attention"), "steps": 20, "strategy": "auto"}
    narrow = {**case, "steps": 1, "dtype": "float32"}
    alone = launched(tmp_path / "one", [{**case, "name": "one"}, {**narrow, "name": "narrow"}], 1)
    cases = [{**case, **way, "name": name} for name, way in WAYS.items()]
    found = launched(tmp_path / "two", cases + [{**narrow, **way, "name": f"{n}-narrow"} for n, way in WAYS.items()], 2)
    for name in WAYS:
        same(alone["one"], found[name], 1e-9, weights=1e-6)
        same(alone["narrow"], found[f"{name}-narrow"], 1e-5, weights=1e-3)


@pytest.mark.slow
def test_both_sides_of_a_mesh_at_once(tmp_path: Path) -> None:
    """FSDP2 and tensor parallelism on four ranks, which go on as two, and as one."""
    case = {"spec": stack(*LAYERS, training_hints={"checkpointing": "selective"}), "steps": 3, "accumulate": 2}
    case["strategy"] = "auto"
    one = launched(tmp_path / "one", [{**case, "name": "one", "steps": 6}], 1)["one"]
    both = {**case, "strategy": "fsdp2", "tensor": 2, "name": "four", "save": "four.ckpt"}
    first = launched(tmp_path, [both], 4)["four"]
    assert first["losses"] == pytest.approx(one["losses"][:6], rel=1e-9)
    rest = {**case, "strategy": "fsdp2", "steps": 6, "resume": "four.ckpt", "gradients": False}
    for ranks, ways in (4, [1]), (2, [1, 2]), (1, [1]):
        cases = [{**rest, "name": f"{ranks}-{tensor}", "tensor": tensor} for tensor in ways]
        for name, found in launched(tmp_path, cases, ranks).items():
            whole = {**found, "losses": first["losses"] + found["losses"], "grads": None}
            same({**one, "grads": None}, whole, 1e-9), name


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_as_one(tmp_path: Path) -> None:
    case = {"spec": stack("mamba2", "gated_retnet", "attention"), "steps": 3, "strategy": "auto"}
    one = launched(tmp_path / "one", [{**case, "name": "one", "steps": 6}], 1)["one"]
    first = launched(tmp_path, [{**case, "strategy": "ddp", "name": "two", "save": "two.ckpt"}], 2)["two"]
    rest = launched(tmp_path, [{**case, "steps": 6, "resume": "two.ckpt", "name": "rest", "gradients": False}], 1)[
        "rest"
    ]
    same({**one, "grads": None}, {**rest, "losses": first["losses"] + rest["losses"]}, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["hybrid", "muon"])
def test_muon_over_ranks(optimizer: str, tmp_path: Path) -> None:
    three, options = stack("mamba2", "gated_retnet", "attention"), {"optimizer": optimizer}
    case = {"spec": three, "strategy": "auto", "options": options, "steps": 1}
    one = launched(tmp_path / "one", [{**case, "name": "one"}], 1)["one"]
    for found in launched(tmp_path / "two", [{**case, **way, "name": name} for name, way in WAYS.items()], 2).values():
        same(one, found, 2e-2)  # Muon makes its steps orthogonal in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision_over_ranks(precision: str, tmp_path: Path) -> None:
    """Decays stay float32, and bf16-mixed keeps every weight so; what is learned is as far off as in one process."""
    case = {"spec": stack(*LAYERS), "steps": 4, "strategy": "auto", "precision": precision, "dtype": "float32"}
    one = launched(tmp_path / "one", [{**case, "name": "one"}], 1)["one"]
    for found in launched(tmp_path / "two", [{**case, **way, "name": name} for name, way in WAYS.items()], 2).values():
        assert found["dtypes"] == one["dtypes"]
        assert found["losses"] == pytest.approx(one["losses"], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("positional", ["alibi", "rope"])
def test_a_single_key_head_and_alibi(positional: str, tmp_path: Path) -> None:
    embedding = {"type": "learned", "positional": positional}
    one_key = stack("attention", "sinks", model={"n_kv_heads": 1}, embedding=embedding)
    case = {"spec": one_key, "strategy": "auto"}
    one = launched(tmp_path / "one", [{**case, "name": "one"}], 1)["one"]
    for found in launched(tmp_path / "two", [{**case, **way, "name": name} for name, way in WAYS.items()], 2).values():
        same(one, found, 1e-9)


@pytest.mark.slow
def test_a_checkpoints_weights_come_in_parts(tmp_path: Path) -> None:
    spec = stack(*LAYERS)
    torch.manual_seed(11)
    save_checkpoint(build(from_data(spec, "case"), dtype=torch.float64), tmp_path / "weights")
    case = {"spec": spec, "strategy": "auto", "weights": str(tmp_path / "weights"), "steps": 1}
    one = launched(tmp_path / "one", [{**case, "name": "one"}], 1)["one"]
    assert (
        one["losses"] != launched(tmp_path / "one", [{**case, "name": "drawn", "weights": None}], 1)["drawn"]["losses"]
    )
    for found in launched(tmp_path / "two", [{**case, **way, "name": name} for name, way in WAYS.items()], 2).values():
        same(one, found, 1e-9)


@pytest.mark.slow
def test_layers_that_are_computed_again_are_the_same_on_two_ranks(tmp_path: Path) -> None:
    case: dict[str, Any] = {"spec": stack("attention", "gated_retnet", "mamba2", "branched"), "strategy": "auto"}
    one = launched(tmp_path / "one", [{**case, "name": "one"}], 1)["one"]
    options = {policy: {"options": {"checkpointing": policy}} for policy in ("selective", "block")}
    cases = [
        {**case, **way, **given, "name": f"{name}-{policy}"}
        for name, way in WAYS.items()
        for policy, given in options.items()
    ]
    found = launched(tmp_path / "two", cases, 2)
    for name in found:
        same(one, found[name], 1e-9)
