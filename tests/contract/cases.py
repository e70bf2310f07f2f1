"""The mixers under the contract, how a case is drawn, and what is compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import eulerstack as es
from eulerstack.kernels.provider import Target
from eulerstack.mixers import Mixer, make_mixer
from eulerstack.segments import Segments
from eulerstack.spec import expand
from eulerstack.state import BranchedState, HistoryState, LayerState, RingState

MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {}),
    "attention_bias": ("attention", {"qkv_bias": True}),
    "attention_window": ("attention", {"window": 5}),
    "attention_capped": ("attention", {"logit_softcap": 2.0, "qk_norm": True}),
    "attention_sinks": ("attention", {"attention_sinks": {"n_per_head": 2}, "window": 6}),
    "attention_sinks_capped": (
        "attention",
        {"attention_sinks": {"learnable": False}, "logit_softcap": 3.0},
    ),
    "attention_alibi": ("attention", {}),
    "attention_alibi_capped": ("attention", {"window": 9, "logit_softcap": 3.0}),
    "attention_yarn": ("attention", {}),
    "attention_latent": ("attention", {"latent_dim": 8}),
    "attention_latent_window": ("attention", {"latent_dim": 6, "rope_head_dim": 4, "window": 7}),
    "branched": (
        "branched",
        {
            "branches": {
                "near": {"type": "attention", "attention": {"window": 5}},
                "far": {"type": "mamba", "mamba": {"d_state": 4, "head_dim": 4, "chunk_size": 8}},
            }
        },
    ),
    "branched_gate": (
        "branched",
        {
            "branches": {"a": {"type": "attention"}, "r": {"type": "retnet"}, "w": {"type": "rwkv"}},
            "selector": {"type": "learned_gate"},
        },
    ),
    "hyena": ("hyena", {"filter_hidden": 8}),
    "hyena_deep": ("hyena", {"filter_hidden": 4, "depth": 3, "d_conv": 2, "filter_decay": 0.2}),
    "linear_attention": ("linear_attention", {"chunk_size": 8}),
    "linear_attention_reference": ("linear_attention", {"chunk_size": 4}),
    "mamba1": ("mamba", {"variant": "mamba1", "d_state": 4, "chunk_size": 8}),
    "mamba1_narrow": (
        "mamba",
        {"variant": "mamba1", "d_state": 3, "d_conv": 2, "dt_rank": 5, "expand": 1, "chunk_size": 4},
    ),
    "mamba1_reference": ("mamba", {"variant": "mamba1", "d_state": 4, "chunk_size": 8}),
    "mamba2": ("mamba", {"d_state": 8, "head_dim": 4, "chunk_size": 8}),
    "mamba2_groups": ("mamba", {"d_state": 4, "head_dim": 4, "n_groups": 2, "d_conv": 3, "chunk_size": 4}),
    "mamba2_reference": ("mamba", {"d_state": 4, "head_dim": 4, "n_groups": 2, "norm_before_gate": True}),
    "retnet": ("retnet", {"chunk_size": 8}),
    "retnet_plain": (
        "retnet",
        {"chunk_size": 8, "rope": False, "group_norm": False, "swish_gate": False, "value_expand": 1.0},
    ),
    "retnet_learned": ("retnet", {"chunk_size": 8, "gamma": "learned"}),
    "retnet_gated": ("retnet", {"chunk_size": 8, "gamma": "gated"}),
    "retnet_undecayed": ("retnet", {"chunk_size": 8, "gamma": 1.0}),
    "retnet_reference": ("retnet", {"chunk_size": 8}),
    "retnet_gated_reference": ("retnet", {"chunk_size": 8, "gamma": "gated", "group_norm": False}),
    "retnet_paper": ("retnet", {"chunk_size": 4, "gamma": "paper_runs", "chunkwise": False}),
    "rwkv": ("rwkv", {"chunk_size": 8}),
    "rwkv_wide_chunks": ("rwkv", {"chunk_size": 32}),
}
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "attention_alibi": {"type": "learned", "positional": "alibi"},
    "attention_alibi_capped": {"type": "learned", "positional": "alibi"},
    "attention_yarn": {"type": "learned", "rope_theta": 100.0, "rope_scaling": {"type": "yarn", "factor": 8.0}},
}
KERNELS = {
    "linear_attention_reference": "torch",
    "mamba1_reference": "torch",
    "mamba2_reference": "torch",
    "retnet_reference": "torch",
    "retnet_gated_reference": "torch",
}
"""Cases whose provider is not the one that `auto` takes here."""
WIDTH = 16
ROOM = 96
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(name: str, dtype: torch.dtype, seed: int = 0) -> Mixer[Any]:
    """The mixer of a case."""
    widths = {"d_model": WIDTH, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256}
    return built(
        *MIXERS[name], {**widths, "embedding": EMBEDDINGS.get(name, {})}, KERNELS.get(name, "auto"), dtype, seed
    )


def built(
    kind: str, options: dict[str, Any], model: dict[str, Any], kernels: str, dtype: torch.dtype, seed: int
) -> Mixer[Any]:
    """A mixer with weights scaled up, so that it matters what it does."""
    torch.manual_seed(seed)
    spec = es.StackBuilder(**model).add(kind, options).spec()
    mixer = make_mixer(expand(spec)[0].mixer, spec, Target(kernels, dtype=dtype)).to(dtype)
    mixer.reset_parameters()
    with torch.no_grad():
        for key, weight in mixer.named_parameters():
            if key.endswith("proj.weight"):
                weight.mul_(2.0)
            if key.endswith(("proj.bias", "sinks")):
                weight.normal_()
    return mixer


def drawn_state(mixer: Mixer[Any], batch: int, start: int, dtype: torch.dtype) -> LayerState:
    """The state after `start` drawn tokens (an empty one for 0)."""
    empty: LayerState = mixer.init_state(batch, ROOM, dtype=dtype)
    if start == 0:
        return empty
    prefix = torch.randn(batch, start, WIDTH, dtype=dtype)
    with torch.no_grad():
        state: LayerState = mixer.chunkwise(prefix, empty, Segments.dense(start), chunk_size=7)[1]
    return state


def seen(state: LayerState, length: int) -> dict[str, Tensor]:
    """What a state says about the future: of a cache, only the slots that a later query can see."""
    if isinstance(state, BranchedState):
        parts = [seen(branch, length) for branch in state.branches]
        return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}
    if isinstance(state, HistoryState):
        return {"inputs": state.inputs[:, :length], "conv": state.conv}
    if not isinstance(state, RingState):
        return state.tensors()
    slots = state.slots
    first = 0 if state.window is None else max(0, length - state.window + 1)
    return {name: tensor[:, torch.arange(first, length) % slots] for name, tensor in state.tensors().items()}


@dataclass
class Result:
    """Outputs [B, T, D], what the final state says, and gradients by name."""

    y: Tensor
    state: dict[str, Tensor]
    grads: dict[str, Tensor]


def run(
    mixer: Mixer[Any],
    x: Tensor,
    state: LayerState,
    start: int,
    pieces: list[int],
    sizes: list[int | None],
) -> Result:
    """Continue `state` by x in pieces of these lengths; a chunk size of 0 means the recurrent form, None the spec's."""
    x = x.clone().requires_grad_()
    opening = state.map(lambda t: t.clone().requires_grad_())
    segments, outs, at, now = Segments.dense(x.shape[1], start), [], 0, opening
    for i, length in enumerate(pieces):
        size = sizes[i] if len(sizes) > 1 else sizes[0]
        part, where = x[:, at : at + length], segments.slice(at, at + length)
        step = mixer.recurrent(part, now, where) if size == 0 else mixer.chunkwise(part, now, where, chunk_size=size)
        y, now = step
        outs.append(y)
        at += length
    y = torch.cat(outs, 1)
    final = seen(now, start + x.shape[1])
    return Result(y, final, gradients(mixer, [y, *final.values()], {"x": x, **opening.tensors()}))


def gradients(mixer: Mixer[Any], outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the outputs, by the leaves and the weights."""
    wanted = {**leaves, **dict(mixer.named_parameters())}
    generator = torch.Generator().manual_seed(1)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {key: torch.zeros_like(wanted[key]) if g is None else g for key, g in zip(wanted, found, strict=True)}


def splits(tokens: int) -> Iterator[tuple[str, list[int], list[int | None]]]:
    """Ways to cut T > 20 tokens: name, lengths, chunk sizes."""
    yield "whole", [tokens], [None]
    yield "chunk 1", [tokens], [1]
    yield "chunk 5", [tokens], [5]
    yield "chunk T", [tokens], [tokens]
    yield "chunk 4T", [tokens], [4 * tokens]
    yield "steps", [1] * tokens, [0]
    yield "chunks of one", [1] * tokens, [3]
    yield "ragged", [1, 2, tokens - 8, 5], [None]
    yield "chunk size changes", [7, 9, tokens - 16], [3, 64, 8]
    yield "chunks to steps", [tokens - 4, 1, 1, 1, 1], [4, 0, 0, 0, 0]
    yield "steps to chunks", [1, 1, 1, tokens - 3], [0, 0, 0, 6]
    yield "steps amid chunks", [6, 1, 1, tokens - 8], [4, 0, 0, None]
