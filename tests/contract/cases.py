"""The mixers under the contract; what they promise is in eulerstack/testing.py."""

from functools import partial
from typing import Any

import torch

from eulerstack.mixers import Mixer
from eulerstack.testing import MODEL, Contract, built

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


def make(name: str, dtype: torch.dtype, seed: int = 0) -> Mixer[Any]:
    """The mixer of a case."""
    model = MODEL | {"embedding": EMBEDDINGS.get(name, {})}
    return built(*MIXERS[name], model, KERNELS.get(name, "auto"), dtype, seed)


def contract(name: str) -> Contract:
    """What the mixer of a case promises."""
    return Contract(partial(make, name))
