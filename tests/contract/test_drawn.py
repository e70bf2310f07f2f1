"""Three forms, one result, for mixers nobody chose: their options, widths and splits are drawn."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eulerstack.segments import Segments
from eulerstack.testing import built, close, run

Case = tuple[str, dict[str, Any], dict[str, Any]]

small = st.integers(1, 5)
chunks = st.sampled_from([1, 2, 3, 8, 16, 100])


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


ATTENTION = {
    "window": maybe(st.integers(1, 30)),
    "logit_softcap": maybe(st.sampled_from([0.5, 4.0, 50.0])),
    "attention_sinks": maybe(st.fixed_dictionaries({"n_per_head": small, "learnable": st.booleans()})),
}
MAMBA = {"d_state": small, "d_conv": st.integers(2, 6), "chunk_size": chunks}
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "attention": {**ATTENTION, "qkv_bias": st.booleans(), "qk_norm": st.booleans()},
    "attention, latent": {
        **ATTENTION,
        "latent_dim": st.integers(1, 3),
        "rope_head_dim": maybe(st.sampled_from([2, 4])),
    },
    "mamba, 1": {"variant": st.just("mamba1"), **MAMBA, "expand": st.integers(1, 3), "dt_rank": maybe(small)},
    "mamba, 2": {**MAMBA, "head_dim": st.just(2), "norm_before_gate": st.booleans()},
    "retnet": {
        "chunkwise": st.booleans(),
        "chunk_size": chunks,
        "rope": st.booleans(),
        "gamma": st.sampled_from(["eq8", "paper_runs", "learned", "gated", 1.0, 0.5, 1e-3]),
        "value_expand": st.sampled_from([1.0, 2.0, 3.0]),
        "group_norm": st.booleans(),
        "swish_gate": st.booleans(),
    },
    "linear_attention": {"chunk_size": chunks},
    "rwkv": {"chunk_size": chunks},
    "hyena": {
        "depth": st.integers(1, 3),
        "filter_hidden": small,
        "filter_decay": st.sampled_from([0.05, 1.5, 100.0]),
        "d_conv": st.integers(2, 5),
    },
}
EMBEDDINGS = st.sampled_from(
    [
        {"type": "learned"},
        {"type": "learned", "positional": "none"},
        {"type": "learned", "rope_theta": 50.0},
        {"type": "learned", "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"type": "learned", "rope_scaling": {"type": "ntk", "factor": 2.0}},
    ]
)


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[Case, int, int, int]:
    """A mixer, how many tokens its state has seen, how many follow, and where those are cut."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = groups * per_group
    options = {k: v for k, v in draw(st.fixed_dictionaries(OPTIONS[name])).items() if v is not None}
    width = heads * draw(st.sampled_from([4, 6]))
    model = {"d_model": width, "n_heads": heads, "n_kv_heads": groups, "max_seq_len": 64, "embedding": draw(EMBEDDINGS)}
    if "latent" in name:
        model["n_kv_heads"] = heads
        if model["embedding"].get("positional") == "none":
            options.pop("rope_head_dim", None)
    tokens = draw(st.integers(2, 30))
    return (name.partition(",")[0], options, model), draw(st.integers(0, 9)), tokens, draw(st.integers(1, tokens - 1))


def agree(case: tuple[Case, int, int, int], seed: int) -> None:
    """Everything at once, in two calls, and step by step after a drawn past; gradients of the last two as well."""
    (kind, options, model), start, tokens, cut = case
    mixer = built(kind, options, model, "auto", torch.float64, seed)
    x = torch.randn(2, start + tokens, model["d_model"], dtype=torch.float64)
    whole, past = mixer.parallel(x)[:, start:], mixer.init_state(2, 64, dtype=torch.float64)
    with torch.no_grad():
        past = mixer.chunkwise(x[:, :start], past, Segments.dense(start))[1]
    two = run(mixer, x[:, start:], past, start, [cut, tokens - cut], [None, 3])
    steps = run(mixer, x[:, start:], past, start, [1] * tokens, [0])
    close(two.y, whole, 1e-11)
    close(steps.y, whole, 1e-11)
    for name in two.state:
        close(two.state[name], steps.state[name], 1e-11)
    grads = {name: grad for name, grad in steps.grads.items() if grad.numel()}
    scale = max(g.abs().max().item() for g in grads.values())
    for name, grad in grads.items():
        assert (two.grads[name] - grad).abs().max().item() <= 1e-11 * scale, name


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_mixer(name: str, data: st.DataObject, seed: int) -> None:
    agree(data.draw(cases(name)), seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_any_mixer_at_length(name: str, data: st.DataObject, seed: int) -> None:
    agree(data.draw(cases(name)), seed)
