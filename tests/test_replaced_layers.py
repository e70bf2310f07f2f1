"""What people put in the place of linear layers (LoRA, quantisation, pruning, parametrisations, hooks) acts everywhere."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import eulerstack as es
from eulerstack.inference.steps import Steps
from eulerstack.layers.linear import is_bare
from eulerstack.testing import close

TOKENS = torch.arange(1, 25).reshape(2, 12) * 7 % 256
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {"qkv_bias": True}),
    "latent": ("attention", {"latent_dim": 8}),
    "retnet": ("retnet", {"gamma": "gated"}),
    "mamba2": ("mamba", {"d_state": 8, "head_dim": 8}),
    "mamba1": ("mamba", {"variant": "mamba1", "d_state": 4, "dt_rank": 4}),
    "linear_attention": ("linear_attention", {}),
    "rwkv": ("rwkv", {}),
    "hyena": ("hyena", {"filter_hidden": 8}),
    "branched": ("branched", {
        "branches": {"a": {"type": "attention"}, "r": {"type": "retnet"}}, "selector": {"type": "learned_gate"}}),
}  # fmt: skip
FFNS: dict[str, dict[str, Any]] = {
    "mlp": {"type": "mlp", "bias": True},
    "gated_mlp": {"type": "gated_mlp"},
    "moe": {"type": "moe", "moe": {"experts": 4, "top_k": 2, "shared_experts": 1}},
}
STACKS = {name: (mixer, "gated_mlp") for name, mixer in MIXERS.items()}
STACKS |= {f"ffn {name}": (MIXERS["retnet"], name) for name in FFNS}


def built(name: str) -> es.Stack:
    """Two layers, and a head of their own."""
    (kind, options), ffn = STACKS[name]
    builder = es.StackBuilder(
        d_model=16,
        n_heads=2,
        vocab_size=256,
        max_seq_len=64,
        embedding={"type": "learned", "tie_word_embeddings": False},
    )
    torch.manual_seed(0)
    return builder.add(kind, options, ffn=FFNS[ffn], repeat=2).build().eval()


def in_forms(model: es.Stack) -> dict[str, Tensor]:
    """The logits [B, T, V] in every form, and by recorded steps."""
    with torch.no_grad():
        found = {"forward": model(TOKENS), "parallel": model.parallel(TOKENS)}
        found["chunkwise"] = model.chunkwise(TOKENS, model.init_state(2), chunk_size=4)[0]
        state, steps = model.init_state(2), []
        for token in TOKENS.split(1, 1):
            logits, state = model.recurrent(token, state)
            steps.append(logits)
    with torch.inference_mode():
        state, one_more, recorded = model.init_state(2), Steps(model), []
        for token in TOKENS.split(1, 1):
            logits, state = one_more(token, state)
            recorded.append(logits.clone())
    return {**found, "recurrent": torch.cat(steps, 1), "recorded": torch.stack(recorded, 1)}


def agree(model: es.Stack, wanted: Tensor, tolerance: float = 5e-5) -> None:
    for form, logits in in_forms(model).items():
        close(logits, wanted, tolerance, f"logits of {form}")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def each_alone(model: es.Stack) -> Iterator[list[str]]:
    """Every linear layer of the first layer, and the head."""
    return ([name] for name in linears(model) if name.startswith("layers.0.") or name == "head")


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STACKS)
def test_lora_by_peft(name: str, alone: bool) -> None:
    """Adapters act in all forms, get gradients, and leave the logits as they are when they are merged."""
    peft = pytest.importorskip("peft")
    for layers in each_alone(built(name)) if alone else [[*linears(built(name))]]:
        model = built(name)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
        before = built(name)(TOKENS)
        wanted = model(TOKENS)
        assert (wanted - before).abs().max() > 3e-4 * before.abs().max(), layers  # many times what `agree` allows
        agree(model, wanted)
        model.losses(TOKENS, TOKENS.roll(-1, 1))[0].backward()
        learning = {key: p.grad for key, p in adapted.named_parameters() if "lora_" in key}
        assert len(learning) == 2 * len(layers)
        assert all(grad is not None and grad.any() for grad in learning.values()), layers
        agree(adapted.merge_and_unload(), wanted)


def test_all_linear_finds_every_linear_layer_but_the_head() -> None:
    peft = pytest.importorskip("peft")
    model = built("branched")
    names = {*linears(model)} - {"head"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[*names]))
    assert sum("lora_A" in key for key, _ in adapted.named_parameters()) == len(names)
    assert list(es.generate(adapted.base_model.model, [[1, 2, 3]], 4))


@pytest.mark.parametrize("name", STACKS)
def test_hooks_run_for_any_number_of_rows(name: str) -> None:
    model, met = built(name), set[str]()
    for key, part in linears(model).items():
        part.register_forward_hook(lambda *_, key=key: met.add(key))
    with torch.no_grad():
        for rows in (1, 3, 40):
            tokens = TOKENS[:1].repeat(rows, 1)
            calls = {
                "forward": partial(model, tokens),
                "losses": partial(model.losses, tokens, tokens),
                "recurrent": partial(model.recurrent, tokens[:, :1], model.init_state(rows)),
                "generate": partial(lambda prompts: [*es.generate(model, prompts, 4)], tokens.tolist()),
            }
            for form, call in calls.items():
                met.clear()
                call()
                assert met == {*linears(model)}, f"{form} of {rows} rows"


def test_a_hook_that_comes_in_the_middle_of_a_text_runs() -> None:
    """Steps that were recorded without it are not run again."""
    model, met = built("attention"), list[int]()
    texts = es.generate(model, [[1, 2, 3]], 12)
    for _ in range(6):
        next(texts)
    model.layers["0"].mixer.o_proj.register_forward_hook(lambda *_: met.append(1))
    assert len([*texts]) == len(met) == 6


def test_a_hook_on_a_mixer_runs_for_long_sequences_too() -> None:
    model, met = built("retnet"), list[int]()
    model.layers["0"].mixer.register_forward_hook(lambda *_: met.append(1))
    with torch.no_grad():
        model(torch.zeros(1, 4100, dtype=torch.int64))
    assert met == [1]


def test_a_layer_that_is_replaced_in_the_middle_of_a_text_is_called() -> None:
    model = built("attention")
    texts = es.generate(model, [[1, 2, 3]], 12)
    for _ in range(6):
        next(texts)
    zero = nn.Linear(16, 256)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    zero.bias.data[17] = 9.0
    model.head = zero
    next(texts)  # its logits were there already
    assert [token for (token,) in texts] == [17] * 5


@pytest.mark.parametrize("name", STACKS)
def test_forward_may_be_put_in_place_by_others(name: str) -> None:
    """As Accelerate's hooks do."""
    model, louder = built(name), built(name)
    for part in linears(model).values():
        part.forward = lambda x, part=part: 1.25 * type(part).forward(part, x)
    for part in linears(louder).values():
        for weight in part.parameters():
            weight.data.mul_(1.25)
    agree(model, louder(TOKENS))


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", STACKS)
def test_int8_weights_of_torchao(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = built(name)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
    assert not any(is_bare(part) for part in linears(model).values())
    plain = built(name)
    for key, part in linears(model).items():
        plain.get_submodule(key).weight.data.copy_(part.weight.dequantize())
    agree(model, plain(TOKENS))


@pytest.mark.filterwarnings("ignore")  # PyTorch's, that torchao shall be used
def test_dynamic_quantisation_of_pytorch() -> None:
    """Inputs are rounded too, by the largest of a call, so that forms agree roughly."""
    for name in ("attention", "latent", "mamba1", "retnet", "rwkv"):
        model = torch.ao.quantization.quantize_dynamic(built(name), {nn.Linear})
        left = linears(model)
        assert not left, f"{[*left]} are left as they were"
        agree(model, built(name)(TOKENS), 0.2)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STACKS)
def test_parametrised_weights(name: str, alone: bool) -> None:
    for layers in each_alone(built(name)) if alone else [[*linears(built(name))]]:
        model, plain = built(name), built(name)
        for key in layers:
            parametrize.register_parametrization(model.get_submodule(key), "weight", Doubled())
            plain.get_submodule(key).weight.data.mul_(2)
        agree(model, plain(TOKENS))
        model.losses(TOKENS, TOKENS.roll(-1, 1))[0].backward()
        assert all(model.get_submodule(key).parametrizations.weight.original.grad.any() for key in layers)


def test_weight_norm_and_pruning() -> None:
    for name in STACKS:
        model = built(name)
        for part in linears(model).values():
            parametrizations.weight_norm(part)
        agree(model, built(name)(TOKENS))
        model, plain = built(name), built(name)
        for key, part in linears(model).items():
            prune.l1_unstructured(part, "weight", 0.3)
            plain.get_submodule(key).weight.data.mul_(part.weight_mask)
        agree(model, plain(TOKENS))


@pytest.mark.parametrize("name", STACKS)
def test_weights_written_through_data_are_seen(name: str) -> None:
    """As an average of weights does when it changes places with them, which no version counter tells of."""

    def swap(model: es.Stack) -> None:
        for weight in model.parameters():
            weight.data.copy_(weight.detach() * 1.5)

    model, fresh = built(name), built(name)
    swap(fresh)
    in_forms(model)
    swap(model)
    agree(model, fresh(TOKENS))


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("swap", ["copy", "assign"])
def test_recorded_steps_see_weights_written_through_data(name: str, swap: str) -> None:
    model, other = built(name), built(name)
    for weight in other.parameters():
        weight.data.mul_(0.5)
    with torch.inference_mode():
        one_more, state = Steps(model), model.init_state(2)
        for token in TOKENS.split(1, 1)[:6]:
            _, state = one_more(token, state)
        kept = copy.deepcopy(state)
        for old, new in zip(model.parameters(), other.parameters(), strict=True):
            if swap == "copy":
                old.data.copy_(new)
            else:
                old.data = new.data.clone()
        logits, _ = one_more(TOKENS[:, 6:7], state)
        wanted, _ = other.recurrent(TOKENS[:, 6:7], kept)
    close(logits, wanted[:, -1], 1e-5)
