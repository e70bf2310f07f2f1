"""Every key of the language does something: each has a row that shows what differs when its value does.

A new key without a row fails `test_every_key_has_a_row`. Keys that hold blocks are covered by the keys in them.
"""

import copy
import io
import tempfile
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

import eulerstack as es
from eulerstack.spec import from_data
from eulerstack.spec.base import Block
from eulerstack.spec.json_schema import by_name
from eulerstack.tokens import document_ids, tokenizer_of
from eulerstack.training.cli import StackCLI
from eulerstack.training.data import Batch

METADATA = {"ModelSpec.name", "ModelSpec.family_hint", "ModelSpec.target_params"}
"""Keys that only `explain` shows: a closed list."""
BASE: dict[str, Any] = {
    "model": {"name": "base", "d_model": 32, "n_heads": 4, "vocab_size": 256, "max_seq_len": 64, "mlp_ratio": 1.0},
    "tokenizer_contract": {"type": "byte"},
    "embedding": {},
    "layer_templates": {"t": {"mixer": {"type": "attention"}, "ffn": {"type": "gated_mlp"}}},
    "layer_schedule": [{"template": "t"}, {"template": "t"}],
    "head": {},
}
SHORT = {"t": "layer_templates.t", "u": "layer_templates.u", "entry": "layer_schedule.0", "hints": "training_hints"}
"""What a path of the table may start with, for what."""


@dataclass
class Row:
    """`aspect` of a stack differs between two values at a path; `given` are values that both stacks have besides."""

    aspect: str
    path: str
    one: Any
    other: Any
    given: dict[str, Any] = field(default_factory=dict)

    def specs(self) -> list[es.StackSpec]:
        return [from_data(self.data(value)) for value in (self.one, self.other)]

    def data(self, value: Any) -> dict[str, Any]:
        data = copy.deepcopy(BASE)
        for path, item in {**self.given, self.path: value}.items():
            _put(data, path, copy.deepcopy(item))
        return data


def _put(data: Any, path: str, value: Any) -> None:
    first, _, rest = path.partition(".")
    *steps, last = f"{SHORT.get(first, first)}.{rest}".rstrip(".").split(".")
    for step in steps:
        data = data[int(step)] if step.isdigit() else data.setdefault(step, {})
    data[int(last) if last.isdigit() else last] = value


def mixer(kind: str, **keys: Any) -> dict[str, Any]:
    return {"t.mixer": {"type": kind, **({kind: keys} if keys else {})}}


def ffn(kind: str, **keys: Any) -> dict[str, Any]:
    return {"t.ffn": {"type": kind, **keys}}


MOE = ffn("moe", moe={"experts": 4})
MAMBA2, MAMBA1 = mixer("mamba", d_state=8, head_dim=8), mixer("mamba", variant="mamba1", d_state=8)
MTP = {"head": {"type": "causal_lm_mtp", "mtp": {"head_template": "t"}}}
TWO = {"layer_templates": {name: {"mixer": {"type": kind}, "ffn": {"type": "mlp"}} for name, kind in zip("tu", ("attention", "retnet"), strict=True)}}  # fmt: skip
BRANCHES = {"t.mixer": {"type": "branched", "branched": {"branches": {"a": {"type": "attention"}, "r": {"type": "retnet"}}}}}  # fmt: skip
MUON = {"hints.optimizer": "hybrid"}
GROUP = {"hints.optimizer_groups": [{"match": "layers.*", "lr_multiplier": 0.5}]}
TOKENIZER = str(Path(__file__).parent / "tokenizer")

ROWS = {
    "MLPSpec.type": Row("parameters", "t.ffn.type", "mlp", "gated_mlp"),
    "MLPSpec.activation": Row("forward", "t.ffn.activation", "gelu", "relu2", ffn("mlp")),
    "MLPSpec.bias": Row("parameters", "t.ffn.bias", False, True, ffn("mlp")),
    "MLPSpec.mlp_ratio": Row("parameters", "t.ffn.mlp_ratio", 1.0, 2.0, ffn("mlp")),
    "GatedMLPSpec.type": Row("parameters", "t.ffn.type", "gated_mlp", "none"),
    "GatedMLPSpec.activation": Row("forward", "t.ffn.activation", "swiglu", "reglu"),
    "GatedMLPSpec.bias": Row("parameters", "t.ffn.bias", False, True),
    "GatedMLPSpec.mlp_ratio": Row("parameters", "t.ffn.mlp_ratio", 1.0, 2.0),
    "MoEFFNSpec.type": Row("parameters", "t.ffn.type", "moe", "mlp"),
    "MoEFFNSpec.activation": Row("forward", "t.ffn.activation", "swiglu", "geglu", MOE),
    "MoEFFNSpec.mlp_ratio": Row("parameters", "t.ffn.mlp_ratio", 1.0, 2.0, MOE),
    "NoFFN.type": Row("parameters", "t.ffn.type", "none", "mlp"),
    "MoESpec.experts": Row("parameters", "t.ffn.moe.experts", 4, 8, MOE),
    "MoESpec.top_k": Row("forward", "t.ffn.moe.top_k", 1, 2, MOE),
    "MoESpec.router": Row("forward", "t.ffn.moe.router", "softmax", "sigmoid", MOE),
    "MoESpec.shared_experts": Row("parameters", "t.ffn.moe.shared_experts", 0, 1, MOE),
    "MoESpec.load_balance_coef": Row("loss", "t.ffn.moe.load_balance_coef", 0.0, 1.0, MOE),
    "MoESpec.z_loss": Row("loss", "t.ffn.moe.z_loss", 0.0, 1.0, MOE),
    "BiasCorrectionSpec.enabled": Row("training", "t.ffn.moe.bias_correction.enabled", True, False, MOE),
    "BiasCorrectionSpec.update_rate": Row("training", "t.ffn.moe.bias_correction.update_rate", 1e-3, 1.0, MOE),
    "SinksSpec.n_per_head": Row("parameters", "t.mixer.attention.attention_sinks.n_per_head", 1, 2),
    "SinksSpec.learnable": Row("parameters", "t.mixer.attention.attention_sinks.learnable", True, False),
    "AttentionSpec.qkv_bias": Row("parameters", "t.mixer.attention.qkv_bias", False, True),
    "AttentionSpec.qk_norm": Row("parameters", "t.mixer.attention.qk_norm", False, True),
    "AttentionSpec.window": Row("forward", "t.mixer.attention.window", None, 4),
    "AttentionSpec.window_mode": Row("refusal", "t.mixer.attention.window_mode", "standard", "sliding"),
    "AttentionSpec.logit_softcap": Row("forward", "t.mixer.attention.logit_softcap", None, 0.1),
    "AttentionSpec.latent_dim": Row("parameters", "t.mixer.attention.latent_dim", None, 8),
    "AttentionSpec.rope_head_dim": Row("parameters", "t.mixer.attention.rope_head_dim", 2, 4, mixer("attention", latent_dim=8)),
    "AttentionMixer.type": Row("parameters", "t.mixer.type", "attention", "hyena"),
    "Mamba2Spec.variant": Row("parameters", "t.mixer.mamba.variant", "mamba2", "mamba1", mixer("mamba", d_state=8)),
    "Mamba2Spec.d_state": Row("parameters", "t.mixer.mamba.d_state", 8, 16, MAMBA2),
    "Mamba2Spec.d_conv": Row("parameters", "t.mixer.mamba.d_conv", 4, 3, MAMBA2),
    "Mamba2Spec.expand": Row("parameters", "t.mixer.mamba.expand", 2, 3, MAMBA2),
    "Mamba2Spec.head_dim": Row("parameters", "t.mixer.mamba.head_dim", 8, 16, MAMBA2),
    "Mamba2Spec.n_groups": Row("parameters", "t.mixer.mamba.n_groups", 1, 2, MAMBA2),
    "Mamba2Spec.norm_before_gate": Row("forward", "t.mixer.mamba.norm_before_gate", False, True, MAMBA2),
    "Mamba2Spec.chunk_size": Row("kept", "t.mixer.mamba.chunk_size", 8, 16, MAMBA2),
    "Mamba1Spec.variant": Row("parameters", "t.mixer.mamba.variant", "mamba1", "mamba2", mixer("mamba", d_state=8)),
    "Mamba1Spec.d_state": Row("parameters", "t.mixer.mamba.d_state", 8, 16, MAMBA1),
    "Mamba1Spec.d_conv": Row("parameters", "t.mixer.mamba.d_conv", 4, 3, MAMBA1),
    "Mamba1Spec.expand": Row("parameters", "t.mixer.mamba.expand", 2, 3, MAMBA1),
    "Mamba1Spec.dt_rank": Row("parameters", "t.mixer.mamba.dt_rank", None, 7, MAMBA1),
    "Mamba1Spec.chunk_size": Row("kept", "t.mixer.mamba.chunk_size", 8, 16, MAMBA1),
    "MambaMixer.type": Row("parameters", "t.mixer.type", "mamba", "attention"),
    "RetNetSpec.chunkwise": Row("kept", "t.mixer.retnet.chunkwise", True, False, mixer("retnet", chunk_size=8)),
    "RetNetSpec.chunk_size": Row("kept", "t.mixer.retnet.chunk_size", 8, 16, mixer("retnet")),
    "RetNetSpec.rope": Row("forward", "t.mixer.retnet.rope", True, False, mixer("retnet")),
    "RetNetSpec.gamma": Row("forward", "t.mixer.retnet.gamma", "eq8", 0.5, mixer("retnet")),
    "RetNetSpec.value_expand": Row("parameters", "t.mixer.retnet.value_expand", 2.0, 1.0, mixer("retnet")),
    "RetNetSpec.group_norm": Row("forward", "t.mixer.retnet.group_norm", True, False, mixer("retnet")),
    "RetNetSpec.swish_gate": Row("parameters", "t.mixer.retnet.swish_gate", True, False, mixer("retnet")),
    "RetNetMixer.type": Row("parameters", "t.mixer.type", "retnet", "attention"),
    "LinearAttentionSpec.chunk_size": Row("kept", "t.mixer.linear_attention.chunk_size", 8, 16, mixer("linear_attention")),
    "LinearAttentionMixer.type": Row("forward", "t.mixer.type", "linear_attention", "attention"),
    "RWKVSpec.chunk_size": Row("kept", "t.mixer.rwkv.chunk_size", 8, 16, mixer("rwkv")),
    "RWKVMixer.type": Row("parameters", "t.mixer.type", "rwkv", "attention"),
    "HyenaSpec.depth": Row("parameters", "t.mixer.hyena.depth", 2, 3, mixer("hyena")),
    "HyenaSpec.filter_hidden": Row("parameters", "t.mixer.hyena.filter_hidden", 64, 8, mixer("hyena")),
    "HyenaSpec.filter_decay": Row("forward", "t.mixer.hyena.filter_decay", 1.5, 0.01, mixer("hyena")),
    "HyenaSpec.d_conv": Row("parameters", "t.mixer.hyena.d_conv", 3, 5, mixer("hyena")),
    "HyenaMixer.type": Row("parameters", "t.mixer.type", "hyena", "attention"),
    "SelectorSpec.type": Row("parameters", "t.mixer.branched.selector.type", "sum", "learned_gate", BRANCHES),
    "BranchedMixer.type": Row("parameters", "t.mixer", BRANCHES["t.mixer"], {"type": "attention"}),
    "NormSpec.type": Row("parameters", "t.norm.type", "rmsnorm", "layernorm"),
    "NormSpec.position": Row("forward", "t.norm.position", "pre", "post"),
    "ResidualSpec.type": Row("forward", "t.residual.type", "sequential", "parallel"),
    "ResidualSpec.scaling": Row("forward", "t.residual.scaling", 1.0, 0.5),
    "KeepSpec.kv_cache": Row("state", "t.state.kv_cache", True, False),
    "KeepSpec.ssm_state": Row("state", "t.state.ssm_state", True, False, MAMBA2),
    "ScheduleEntry.template": Row("parameters", "entry.template", "t", "u", TWO),
    "ScheduleEntry.repeat": Row("parameters", "entry.repeat", 1, 2),
    "ScheduleEntry.shared": Row("parameters", "entry.shared", None, "s", {"layer_schedule.0.repeat": 2}),
    "PatternEntry.pattern": Row("parameters", "entry", {"pattern": "t"}, {"pattern": "t u"}, TWO),
    "PatternEntry.repeat": Row("parameters", "entry", {"pattern": "t"}, {"pattern": "t", "repeat": 2}),
    "ResidualOverride.scaling": Row("forward", "entry.override", None, {"residual": {"scaling": 0.5}}),
    "AttentionOverride.window": Row("forward", "entry.override", None, {"attention": {"window": 4}}),
    "NormOverride.type": Row("parameters", "entry.override", None, {"norm": {"type": "layernorm"}}),
    "NormOverride.position": Row("forward", "entry.override", None, {"norm": {"position": "post"}}),
    "FFNOverride.activation": Row("forward", "entry.override", None, {"ffn": {"activation": "reglu"}}),
    "ModelSpec.name": Row("explained", "model.name", "base", "another"),
    "ModelSpec.d_model": Row("parameters", "model.d_model", 32, 64),
    "ModelSpec.vocab_size": Row("parameters", "model.vocab_size", 256, 300),
    "ModelSpec.max_seq_len": Row("state", "model.max_seq_len", 64, 128),
    "ModelSpec.n_heads": Row("forward", "model.n_heads", 4, 2),
    "ModelSpec.n_kv_heads": Row("parameters", "model.n_kv_heads", None, 2),
    "ModelSpec.mlp_ratio": Row("parameters", "model.mlp_ratio", 1.0, 2.0),
    "ModelSpec.dtype": Row("parameters", "model.dtype", "float32", "bfloat16"),
    "MuPSpec.d_model": Row("forward", "model.mup.d_model", 32, 16, {"model.mup": {}}),
    "MuPSpec.n_heads": Row("forward", "model.mup.n_heads", 4, 2, {"model.mup": {"d_model": 16}}),
    "ModelSpec.family_hint": Row("explained", "model.family_hint", None, "dense"),
    "ModelSpec.target_params": Row("explained", "model.target_params", None, 7_000_000),
    "ByteTokenizer.type": Row("text", "tokenizer_contract", {"type": "byte"}, {"type": "hf", "pretrained": TOKENIZER}),
    "HFTokenizer.type": Row("text", "tokenizer_contract", {"type": "hf", "pretrained": TOKENIZER}, {"type": "byte"}),
    "HFTokenizer.pretrained": Row("text", "tokenizer_contract.pretrained", TOKENIZER, "nowhere", {"tokenizer_contract": {"type": "hf"}}),
    "HFTokenizer.add_bos": Row("text", "tokenizer_contract.add_bos", False, True, {"tokenizer_contract": {"type": "hf", "pretrained": TOKENIZER}}),
    "HFTokenizer.add_eos": Row("text", "tokenizer_contract.add_eos", False, True, {"tokenizer_contract": {"type": "hf", "pretrained": TOKENIZER}}),
    "RopeScalingSpec.type": Row("forward", "embedding.rope_scaling.type", "linear", "ntk", {"embedding.rope_scaling.factor": 4.0}),
    "RopeScalingSpec.factor": Row("forward", "embedding.rope_scaling.factor", 1.0, 4.0, {"embedding.rope_scaling.type": "linear"}),
    "RopeScalingSpec.original_max_seq_len": Row("forward", "embedding.rope_scaling.original_max_seq_len", 16, 64, {"embedding.rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "EmbeddingSpec.type": Row("refusal", "embedding.type", "learned", "sinusoidal"),
    "EmbeddingSpec.positional": Row("forward", "embedding.positional", "rope", "alibi"),
    "EmbeddingSpec.rope_theta": Row("forward", "embedding.rope_theta", 1e4, 50.0),
    "EmbeddingSpec.tie_word_embeddings": Row("parameters", "embedding.tie_word_embeddings", True, False),
    "EmbeddingSpec.scale": Row("forward", "embedding.scale", 1.0, 8.0),
    "MultiTokenSpec.n_predict": Row("parameters", "head.mtp.n_predict", 1, 2, MTP),
    "MultiTokenSpec.head_layers": Row("parameters", "head.mtp.head_layers", 1, 2, MTP),
    "MultiTokenSpec.head_template": Row("parameters", "head.mtp.head_template", "t", "u", {**TWO, **MTP}),
    "MultiTokenSpec.train_loss_weight": Row("loss", "head.mtp.train_loss_weight", 0.3, 1.0, MTP),
    "HeadSpec.type": Row("parameters", "head", {"type": "causal_lm"}, MTP["head"]),
    "HeadSpec.tie_weights": Row("refusal", "head.tie_weights", True, False),
    "HeadSpec.logit_softcap": Row("forward", "head.logit_softcap", None, 0.1),
    "TrainingHints.seed": Row("weights", "hints.seed", 0, 1),
    "TrainingHints.lr_peak": Row("training", "hints.lr_peak", 1e-3, 1e-2),
    "TrainingHints.lr_floor_ratio": Row("training", "hints.lr_floor_ratio", 0.1, 0.9),
    "TrainingHints.betas": Row("training", "hints.betas", [0.9, 0.95], [0.1, 0.2]),
    "TrainingHints.weight_decay": Row("training", "hints.weight_decay", 0.0, 10.0),
    "TrainingHints.grad_clip": Row("training", "hints.grad_clip", None, 1e-9),
    "TrainingHints.warmup_steps_ratio": Row("training", "hints.warmup_steps_ratio", 0.0, 1.0),
    "TrainingHints.init": Row("weights", "hints.init", "mixer", "normal", mixer("retnet")),
    "TrainingHints.dropout": Row("training", "hints.dropout", 0.0, 0.5),
    "TrainingHints.checkpointing": Row("kept", "hints.checkpointing", "none", "block"),
    "TrainingHints.router_aux_loss_coef": Row("training", "hints.router_aux_loss_coef", 0.0, 1.0, MOE),
    "TrainingHints.z_loss": Row("training", "hints.z_loss", 0.0, 1.0),
    "TrainingHints.router_lr_multiplier": Row("training", "hints.router_lr_multiplier", 1.0, 0.0, MOE),
    "TrainingHints.optimizer": Row("training", "hints.optimizer", "adamw", "hybrid"),
    "TrainingHints.schedule": Row("training", "hints.schedule", "cosine", "linear"),
    "TrainingHints.decay_steps_ratio": Row("training", "hints.decay_steps_ratio", 0.2, 0.9, {"hints.schedule": "wsd"}),
    "MuonSpec.lr": Row("training", "hints.muon.lr", 0.02, 0.2, MUON),
    "MuonSpec.momentum": Row("training", "hints.muon.momentum", 0.95, 0.1, MUON),
    "MuonSpec.nesterov": Row("training", "hints.muon.nesterov", True, False, MUON),
    "MuonSpec.ns_steps": Row("training", "hints.muon.ns_steps", 5, 1, MUON),
    "MuonSpec.weight_decay": Row("training", "hints.muon.weight_decay", 0.01, 5.0, MUON),
    "GroupSpec.match": Row("training", "hints.optimizer_groups.0.match", "layers.*", "embedding.*", GROUP),
    "GroupSpec.lr_multiplier": Row("training", "hints.optimizer_groups.0.lr_multiplier", 1.0, 0.0, GROUP),
    "GroupSpec.weight_decay": Row("training", "hints.optimizer_groups.0.weight_decay", 0.0, 10.0, GROUP),
    "AttentionSpec.attn_drop": Row("training", "t.mixer.attention.attn_drop", 0.0, 0.9),
    "AttentionOverride.attn_drop": Row("training", "entry.override", None, {"attention": {"attn_drop": 0.9}}),
    "StackSpec.schema_version": Row("refusal", "schema_version", 1, 2),
}  # fmt: skip


def built(spec: es.StackSpec) -> es.Stack:
    """A stack whose mixers matter: projections four times as large as drawn."""
    torch.manual_seed(0)
    model = es.build(spec, kernels="torch")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.mul_(4)
    return model


def parameters(spec: es.StackSpec) -> Any:
    model = es.build(spec, device="meta")
    return [(name, tuple(weight.shape), weight.dtype) for name, weight in model.named_parameters()]


def forward(spec: es.StackSpec) -> Tensor:
    with torch.no_grad():
        return built(spec)(torch.arange(48)[None])


def loss(spec: es.StackSpec) -> Tensor:
    return built(spec).losses(torch.arange(48)[None], torch.arange(48)[None] + 1)[0].detach()


def kept(spec: es.StackSpec) -> Any:
    """What the backward keeps: how a sequence was cut shows in the shapes."""
    shapes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        built(spec).losses(torch.arange(48)[None], torch.arange(48)[None])
    return shapes


def state(spec: es.StackSpec) -> Any:
    """The sizes of what inference keeps, or the sentence that it keeps nothing."""
    try:
        state = es.build(spec, device="meta").init_state(1)
        return state.max_tokens, state.nbytes()
    except ValueError as error:
        return str(error)


def explained(spec: es.StackSpec) -> str:
    from eulerstack.cli.explain import _tree

    out = io.StringIO()
    Console(file=out, width=200).print(_tree(spec, es.estimate(spec)))
    return out.getvalue()


def text(spec: es.StackSpec) -> Any:
    try:
        return document_ids(tokenizer_of(spec.tokenizer_contract), "a b")
    except ValueError as error:
        return str(error)


class _Rates(L.Callback):
    """The learning rates of each step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *more: Any) -> None:
        self.rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])


def training(spec: es.StackSpec) -> Any:
    """Learning rates and weights of four steps."""
    rates, module = _Rates(), es.StackModule(spec, kernels="torch")
    torch.manual_seed(0)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_steps=4, accelerator="cpu", callbacks=[rates], log_every_n_steps=1, **quiet)  # type: ignore[arg-type]
    batches = [Batch(torch.arange(i, i + 32)[None], torch.arange(i, i + 32)[None] + 1, None, 1.0) for i in range(4)]
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return rates.rates, [value.tolist() for value in module.model.state_dict().values()]


def weights(spec: es.StackSpec) -> Any:
    """What `fit` draws."""
    with tempfile.TemporaryDirectory() as folder:
        es.dump(spec, f"{folder}/spec.yml")
        config = {"seed_everything": False, "model": {"spec": f"{folder}/spec.yml", "settings": None}}
        StackCLI.seed(SimpleNamespace(config=config, _get=dict.get))  # type: ignore[arg-type]
    return [weight.tolist() for weight in es.build(spec).parameters()]


ASPECTS: dict[str, Callable[[es.StackSpec], Any]] = {
    f.__name__: f for f in (parameters, forward, loss, kept, state, explained, text, training, weights)
}


def holds_blocks(annotation: Any) -> bool:
    """Whether a key's value is made of blocks, whose keys have rows of their own."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return True
    return any(holds_blocks(part) for part in typing.get_args(annotation))


def keys() -> set[str]:
    """Every key of every block of the language, by its class."""
    own = {name: cls for name, cls in by_name().items() if cls.__module__.startswith("eulerstack.spec")}
    blocks = {name: cls for name, cls in own.items() if cls.__module__ != "eulerstack.spec.extensions"}
    fields = [(name, key, info) for name, cls in blocks.items() for key, info in cls.model_fields.items()]
    return {f"{name}.{key}" for name, key, info in fields if key == "pattern" or not holds_blocks(info.annotation)}


def test_every_key_has_a_row() -> None:
    assert keys() == set(ROWS)
    assert {key for key, row in ROWS.items() if row.aspect == "explained"} == METADATA


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.aspect != "refusal"])
def test_a_key_makes_a_difference(key: str) -> None:
    one, other = map(ASPECTS[ROWS[key].aspect], ROWS[key].specs())
    if isinstance(one, Tensor):
        assert one.shape != other.shape or (one - other).abs().max() > 1e-4
    else:
        assert one != other


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.aspect == "refusal"])
def test_a_key_that_asserts_is_refused_where_it_does_not_hold(key: str) -> None:
    row = ROWS[key]
    from_data(row.data(row.one))
    with pytest.raises(es.SpecError, match=row.path.rpartition(".")[2]):
        from_data(row.data(row.other))
