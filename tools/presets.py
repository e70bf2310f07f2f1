"""The presets that follow from tables, and the figures in the header of every preset.

`make presets` writes what `preset_files` returns: the llm_* tiers, RetNet's sizes with their twins and ablation rows,
and a mini of each arch_*. All other presets are written by hand, but for the two lines of figures in their headers.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import eulerstack as es
from eulerstack.spec import expand, from_data

PRESETS = Path(__file__).parents[1] / "presets"
HEADER = "# yaml-language-server: $schema=../schemas/eulerstack-v1.json\n# {title}\n# Source: {source}.\n"
CONTEXT = 8192
COUNTS = {"B": 1e9, "M": 1e6}
BYTES: dict[str, float] = {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10}

Data = dict[str, Any]


class Preset(NamedTuple):
    """A stack file: what it isolates, where that is from, and the stack."""

    title: str
    source: str
    data: Data


class Shape(NamedTuple):
    """A tier's widths and its peak learning rate, after GPT-3's sizes (arXiv 2005.14165, table 2.1)."""

    d_model: int
    layers: int
    n_heads: int
    n_kv_heads: int
    lr_peak: float


class Family(NamedTuple):
    """What the tiers of one name have in common: `layer` again and again, or a pattern of four layers."""

    title: str
    source: str
    templates: dict[str, Data]
    pattern: str | list[Data] = "layer"
    positional: str = "rope"
    grouped: bool = True


SHAPES = {
    "0p03b": Shape(512, 8, 8, 2, 6e-4),  # a mixture's only
    "0p1b": Shape(768, 12, 12, 4, 6e-4),
    "0p8b": Shape(1536, 24, 12, 4, 2.5e-4),
    "2b": Shape(2048, 32, 16, 4, 2e-4),
    "4b": Shape(3072, 32, 24, 8, 1.6e-4),
    "16b": Shape(5120, 48, 40, 8, 1e-4),
}
"""A mixture of experts has the shape of the tier before, so that about a third of its parameters serve a token."""

MLP_RATIOS = {
    "0p1b": {"simple": 2.25, "mistral": 2.75, "jamba": 1.75, "moe": 1.5, "mla": 2.0},
    "0p8b": {"simple": 3.125, "mistral": 3.5, "jamba": 2.625, "moe": 4.5, "mla": 3.25},
    "2b": {"simple": 3.5, "mistral": 4.0, "jamba": 3.0, "moe": 1.375, "mla": 3.75},
    "4b": {"simple": 3.0, "mistral": 3.375, "jamba": 2.5, "moe": 1.125, "mla": 3.25},
    "16b": {"simple": 2.875, "mistral": 3.375, "jamba": 2.375, "moe": 2.125, "mla": 3.25},
}
"""Widths of the FFNs over d_model that give each stack as many parameters as its name says, in multiples of 64."""

GATED = {"type": "gated_mlp", "activation": "swiglu"}
ATTENTION = {"mixer": {"type": "attention"}, "ffn": GATED}
WINDOWED = {"mixer": {"type": "attention", "attention": {"window": 4096}}, "ffn": GATED}
LATENT = {"mixer": {"type": "attention", "attention": {"latent_dim": 512, "rope_head_dim": 64}}, "ffn": GATED}
EXPERTS = {"mixer": {"type": "attention"}, "ffn": {"type": "moe", "moe": {"experts": 8, "top_k": 2}}}
MAMBA1 = {"mixer": {"type": "mamba", "mamba": {"variant": "mamba1", "d_state": 16}}, "ffn": GATED}

FAMILIES = {
    "simple": Family(
        "the plain transformer that the others are compared with",
        "Touvron et al. 2023, arXiv 2302.13971 (LLaMA)",
        {"layer": ATTENTION},
        grouped=False,
    ),
    "mistral": Family(
        "grouped queries, and windows of 4,096 tokens in three layers of four",
        "Jiang et al. 2023, arXiv 2310.06825 (Mistral 7B)",
        {"layer": WINDOWED},
        [{"template": "layer", "repeat": 3}, {"template": "layer", "override": {"attention": {"window": None}}}],
    ),
    "jamba": Family(
        "three layers of Mamba for one of attention, without rotary positions",
        "Lieber et al. 2024, arXiv 2403.19887 (Jamba)",
        {"m": MAMBA1, "a": ATTENTION},
        "m m m a",
        positional="none",
    ),
    "moe": Family(
        "eight experts in every layer, two of which serve a token",
        "Jiang et al. 2024, arXiv 2401.04088 (Mixtral)",
        {"layer": EXPERTS},
    ),
    "mla": Family(
        "latent attention, whose cache holds a latent instead of keys and values",
        "DeepSeek-AI 2024, arXiv 2405.04434 (DeepSeek-V2)",
        {"layer": LATENT},
        grouped=False,
    ),
}

RETNETS = {"1p3b": (2048, 24, 6e-4), "2p7b": (2560, 32, 3e-4), "6p7b": (4096, 32, 3e-4)}
"""d_model, layers and peak learning rate of the paper's three sizes."""
RETNET_SOURCE = "Sun et al. 2023, arXiv 2307.08621 (RetNet)"
GELU = {"type": "mlp", "activation": "gelu"}
LAYERNORM = {"type": "layernorm"}

ABLATIONS: dict[str, tuple[str, int, Data]] = {
    "retnet_200m": ("the row that the other five change", 4, {}),
    "retnet_200m_no_gate": ("without the swish gate", 4, {"swish_gate": False}),
    "retnet_200m_no_groupnorm": ("without the norm of each head", 4, {"group_norm": False}),
    "retnet_200m_no_decay": ("gamma = 1, no decay", 4, {"gamma": 1.0}),
    "retnet_200m_one_decay": ("gamma = 127/128 in all heads, one scale", 4, {"gamma": 127 / 128}),
    "retnet_200m_head_64": ("heads of 64 channels instead of 256", 16, {}),
}
"""What each row changes, its heads, and its options of the retnet mixer; 16,000 tokens keep all near 200M."""

CAPS = {
    "window": 256, "latent_dim": 64, "rope_head_dim": 32, "d_state": 64, "chunk_size": 64, "experts": 8, "top_k": 2,
    "shared_experts": 1, "mlp_ratio": 2.0, "scale": 16.0,
}  # fmt: skip
"""The largest values that a mini keeps of its stack."""
MINI_LAYERS = 8
LINE = 110


def preset_files() -> dict[str, str]:
    """The text of every preset by its name, as it should stand in presets/."""
    written = {file.stem: file.read_text(encoding="utf-8") for file in sorted(PRESETS.glob("*.yml"))}
    texts = written | {name: _text(preset) for name, preset in generated()}
    return {name: with_figures(text) for name, text in texts.items()}


def generated() -> Iterator[tuple[str, Preset]]:
    """The presets that no one writes."""
    for tier in MLP_RATIOS:
        for family in FAMILIES:
            name = f"llm_{tier}_{family}"
            yield name, _tier(name, tier, family)
    yield from _retnets()
    for file in sorted(PRESETS.glob("arch_*.yml")):
        if "_mini" not in file.stem and file.stem != "arch_expert_research":  # whose mini has twins, and is its own
            yield f"{file.stem}_mini", _mini(file)


def _tier(name: str, tier: str, family: str) -> Preset:
    title, source, templates, pattern, positional, grouped = FAMILIES[family]
    before = list(SHAPES)[list(SHAPES).index(tier) - 1]
    width, layers, heads, kv_heads, lr = SHAPES[before if family == "moe" else tier]
    groups = {"n_kv_heads": kv_heads} if grouped else {}
    model = {"d_model": width, "n_heads": heads} | groups | {"mlp_ratio": MLP_RATIOS[tier][family]}
    again = {"template": pattern, "repeat": layers}
    entry = again if pattern == "layer" else {"pattern": pattern, "repeat": layers // 4}
    data = _stack(name, model, templates, entry, lr, positional=positional)
    return Preset(f"{_size(tier)} parameters: {title}.", source, data)


def _size(tier: str) -> str:
    """0.1B of 0p1b."""
    return tier.replace("p", ".").upper()


def _retnets() -> Iterator[tuple[str, Preset]]:
    """The paper's sizes, each with its twin, and the rows of the ablation."""
    for size, (width, layers, lr) in RETNETS.items():
        name, twin = f"retnet_{size}", f"retnet_{size}_attention"
        data = _retnet(name, width, layers, width // 256, lr)
        yield name, Preset(f"The paper's RetNet of {_size(size)} parameters.", RETNET_SOURCE, data)
        title = f"The attention twin of {name}: as wide, as deep, as many parameters."
        model = {"d_model": width, "n_heads": width // 128, "mlp_ratio": 4}
        layer = {"mixer": {"type": "attention"}, "ffn": GELU, "norm": LAYERNORM}
        data = _stack(twin, model, {"layer": layer}, {"template": "layer", "repeat": layers}, lr)
        yield twin, Preset(title, RETNET_SOURCE, data)
    for name, (title, heads, options) in ABLATIONS.items():
        data = _retnet(name, 1024, 16, heads, 6e-4, options, vocab=16000)
        yield name, Preset(f"RetNet's ablation at 200M: {title}.", RETNET_SOURCE, data)


def _retnet(
    name: str, width: int, layers: int, heads: int, lr: float, options: Data | None = None, vocab: int = 32000
) -> Data:
    mixer = {"type": "retnet", "retnet": {"gamma": "paper_runs", "chunk_size": 512} | (options or {})}
    model = {"d_model": width, "n_heads": heads, "mlp_ratio": 2}
    layer = {"mixer": mixer, "ffn": GELU, "norm": LAYERNORM}
    entry = {"template": "layer", "repeat": layers}
    return _stack(name, model, {"layer": layer}, entry, lr, positional="none", vocab=vocab)


def _stack(
    name: str,
    model: Data,
    templates: dict[str, Data],
    entry: Data,
    lr_peak: float,
    *,
    positional: str = "rope",
    vocab: int = 32000,
) -> Data:
    return {
        "schema_version": 1,
        "model": {"name": name} | model | {"vocab_size": vocab, "max_seq_len": CONTEXT, "dtype": "bfloat16"},
        "tokenizer_contract": {"type": "hf", "pretrained": "tokenizer.json"},
        "embedding": {"type": "learned", "positional": positional},
        "layer_templates": templates,
        "layer_schedule": [entry],
        "head": {"type": "causal_lm"},
        "training_hints": {"lr_peak": lr_peak},
    }


def _mini(file: Path) -> Preset:
    """The same layers, as few of each as show the schedule, narrow enough for a laptop, on bytes."""
    text, spec = file.read_text(encoding="utf-8"), es.load(file)
    data = _capped(spec.model_dump(mode="json", exclude_unset=True))
    groups = spec.model.n_heads // spec.model.kv_heads
    data["model"] |= {"name": f"{file.stem}_mini", "d_model": 256, "n_heads": 4}
    data["model"] |= {"n_kv_heads": max(1, 4 // groups)} if groups > 1 else {}
    data["model"] |= {"vocab_size": 256, "max_seq_len": CONTEXT, "dtype": "float32"}
    data |= {"tokenizer_contract": {"type": "byte"}, "training_hints": {"lr_peak": 3e-3}}
    for repeat in (4, 3, 2, 1):
        data["layer_schedule"] = _repeated(data["layer_schedule"], repeat)
        if len(expand(from_data(data))) <= MINI_LAYERS:
            break
    title = f"The mini of {file.stem}: its kinds of layers at d_model 256, on bytes."
    return Preset(title, _line("# Source: (.*)\\.", text), data)


def _capped(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _capped(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_capped(v) for v in value]
    return min(value, CAPS[key]) if key in CAPS and value is not None else value


def _repeated(value: Any, most: int) -> Any:
    """A schedule whose entries are repeated at most so often."""
    if isinstance(value, list):
        return [_repeated(v, most) for v in value]
    if isinstance(value, dict):
        return {k: min(v, most) if k == "repeat" else _repeated(v, most) for k, v in value.items()}
    return value


def _line(pattern: str, text: str) -> str:
    found = re.search(f"^{pattern}$", text, re.MULTILINE)
    assert found is not None, pattern
    return found[1]


def _text(preset: Preset) -> str:
    header = HEADER.format(title=preset.title, source=preset.source)
    return header + "\n".join(_yaml(preset.data)) + "\n"


def _yaml(data: Data) -> Iterator[str]:
    """Blocks down to the keys of the model and of the templates; what is deeper stands in one line, if it fits."""
    for key, value in data.items():
        if isinstance(value, list):
            yield f"{key}:"
            yield from (f"  - {_flow(item)}" for item in value)
        else:
            yield from _block(key, value, depth=2 if key == "layer_templates" else 1)


def _block(key: str, value: Any, depth: int, pad: str = "") -> Iterator[str]:
    line = f"{pad}{key}: {_flow(value)}"
    if isinstance(value, dict) and (depth > 0 or len(line) > LINE):
        yield f"{pad}{key}:"
        for inner, item in value.items():
            yield from _block(inner, item, depth - 1, pad + "  ")
    else:
        yield line


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump([value], default_flow_style=True, width=10**6, sort_keys=False)
    return text.strip()[1:-1]


def with_figures(text: str) -> str:
    """The text with the stack's parameters and its state at 8,192 tokens, of one row, below the source."""
    cost = es.estimate(es.loads(text))
    count, state = _in(COUNTS, cost.parameters), _in(BYTES, cost.state_bytes(1, CONTEXT)["total"])
    bare = re.sub("^# (parameters|state at 8k): .*\n", "", text, flags=re.MULTILINE)
    figures = f"# parameters: {count}\n# state at 8k: {state}\n"
    return re.sub("^# Source: .*\n", lambda source: source[0] + figures, bare, count=1, flags=re.MULTILINE)


def _in(units: dict[str, float], number: int) -> str:
    """Three digits in the largest unit that the number reaches."""
    unit = next(unit for unit, size in units.items() if number >= size)
    return f"{number / units[unit]:.3g}{unit}"


if __name__ == "__main__":
    for name, text in preset_files().items():
        (PRESETS / f"{name}.yml").write_text(text, encoding="utf-8")
