"""The stacks that generation is tried on: the minis of all presets, and stacks nobody chose."""

from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st

import eulerstack as es
from eulerstack.spec.mixers import side_by_side

from ..contract.test_drawn import EMBEDDINGS, OPTIONS, maybe

MINIS = sorted(name for name in es.presets() if "mini" in name)
ROOM = 64
"""max_seq_len of drawn stacks."""


def loud(spec: es.StackSpec, dtype: torch.dtype | None = None, seed: int = 0) -> es.Stack:
    """A spec's stack with weights scaled up, so that it matters what the mixers do."""
    torch.manual_seed(seed)
    model = es.build(spec, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.mul_(2.0)
            if name.endswith(("proj.bias", "sinks")):
                weight.normal_(std=0.1)
    return model.eval()


@lru_cache(maxsize=2)
def mini(name: str, window: int | None = 12) -> es.Stack:
    """A preset's mini; its windows are so narrow that texts outgrow them (None: as the preset has them)."""
    spec = es.load(name)
    keys = [
        f"layer_templates.{template}.mixer{branch}.attention.window={window}"
        for template, layer in spec.layer_templates.items()
        for branch, mixer in side_by_side(layer.mixer).items()
        if mixer.type == "attention" and mixer.attention.window is not None
    ]
    return loud(es.load(name, keys if window else []))


@st.composite
def stacks(draw: st.DrawFn) -> es.StackSpec:
    """One to four layers of any mixers, channel mixers, norms and residuals, some side by side, some sharing weights."""
    names = draw(st.lists(st.sampled_from([*OPTIONS, "branched"]), min_size=1, max_size=3))
    embedding = {**draw(EMBEDDINGS), **draw(st.sampled_from([{}, {"scale": 5.0}, {"tie_word_embeddings": False}]))}
    rotary = embedding.get("positional") != "none"
    kinds = [draw(mixers(name, rotary)) for name in names]
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    builder = es.StackBuilder(
        draw(st.sampled_from([4, 6])) * groups * per_group,
        groups * per_group,
        max_seq_len=ROOM,
        n_kv_heads=groups * (per_group if any(latent(kind) for kind in kinds) else 1),
        embedding=embedding,
        head={"logit_softcap": draw(maybe(st.sampled_from([2.0, 30.0])))},
    )
    left = 4
    for i, mixer in enumerate(kinds):
        repeat = draw(st.integers(1, min(2, left - (len(kinds) - i - 1))))
        shared = {"shared": f"weights {i}"} if repeat == 2 and draw(st.booleans()) else {}
        builder.template(f"t{i}", mixer, **draw(PARTS)).layers(f"t{i}", repeat, **shared)
        left -= repeat
    return builder.spec()


@st.composite
def mixers(draw: st.DrawFn, name: str, rotary: bool) -> dict[str, Any]:
    """A mixer as a stack file has it; `branched` is two or three side by side."""
    if name == "branched":
        parts = draw(st.lists(st.sampled_from(list(OPTIONS)), min_size=2, max_size=3))
        branches = {f"b{i}": draw(mixers(part, rotary)) for i, part in enumerate(parts)}
        selector = {"type": draw(st.sampled_from(["sum", "learned_gate"]))}
        return {"type": name, name: {"branches": branches, "selector": selector}}
    options = {k: v for k, v in draw(st.fixed_dictionaries(OPTIONS[name])).items() if v is not None}
    if not rotary:
        options.pop("rope_head_dim", None)
    kind = name.partition(",")[0]
    return {"type": kind, kind: options}


def latent(mixer: dict[str, Any]) -> bool:
    """Whether some attention in it has a latent cache."""
    branches = mixer.get("branched", {}).get("branches", {}).values()
    return "latent_dim" in mixer.get("attention", {}) or any(latent(branch) for branch in branches)


PARTS = st.fixed_dictionaries(
    {
        "ffn": st.sampled_from(
            [
                {"type": "none"},
                {"type": "mlp", "activation": "relu2", "bias": True},
                {"type": "gated_mlp"},
                {"type": "moe", "moe": {"experts": 4, "top_k": 2, "shared_experts": 1}},
                {"type": "moe", "moe": {"experts": 3, "top_k": 1, "router": "sigmoid", "bias_correction": {}}},
            ]
        ),
        "norm": st.fixed_dictionaries(
            {
                "type": st.sampled_from(["rmsnorm", "layernorm"]),
                "position": st.sampled_from(["pre", "post", "sandwich"]),
            }
        ),
        "residual": st.fixed_dictionaries(
            {"type": st.sampled_from(["sequential", "parallel"]), "scaling": st.sampled_from([1.0, 0.5])}
        ),
    }
)
