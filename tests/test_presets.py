"""The shipped presets: what their headers say, what their names promise, and that the minis learn."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import eulerstack as es
from tools.presets import generated, preset_files

TIERS = [
    f"llm_{size}_{kind}"
    for size in ("0p1b", "0p8b", "2b", "4b", "16b")
    for kind in ("simple", "mistral", "jamba", "moe", "mla")
]
ARCHS = [
    *("beginner_gpt2", "beginner_llama", "intermediate_mistral", "intermediate_gemma2", "intermediate_qwen_longctx"),
    *("advanced_jamba", "advanced_samba", "advanced_retnet", "advanced_mla"),
    *("expert_research", "expert_mixtral_moe", "expert_striped_hyena", "expert_blackmamba_moe", "expert_deepseek_moe"),
    *("expert_retnet_moe", "expert_frontier_full_moe", "expert_progressive_stack"),
]
PUBLISHED = {
    "arch_beginner_gpt2": 124e6,
    "arch_beginner_llama": 1.24e9,
    "arch_intermediate_mistral": 7.24e9,
    "arch_intermediate_gemma2": 2.61e9,
    "arch_intermediate_qwen_longctx": 7.62e9,
    "arch_advanced_mamba2": 2.7e9,
    "arch_expert_mixtral_moe": 46.7e9,
    "arch_expert_striped_hyena": 7.65e9,
    "arch_expert_blackmamba_moe": 2.8e9,
    "arch_expert_deepseek_moe": 15.7e9,
}
MINIS = sorted(name for name in es.presets() if "_mini" in name)
QUICK = {"arch_beginner_gpt2_mini", "arch_advanced_samba_mini", "arch_expert_deepseek_moe_mini"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Steps so small that threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def promised(name: str) -> float | None:
    """Parameters that a name speaks of: 0p1b, 200m."""
    found = re.search(r"_(\d+(?:p\d+)?)([bm])(?:_|$)", name)
    return float(found[1].replace("p", ".")) * {"b": 1e9, "m": 1e6}[found[2]] if found else None


def parameters(name: str) -> int:
    return es.estimate(es.load(name)).parameters


def test_the_files_are_what_the_tables_say() -> None:
    """After a change of a table, of a file or of a count: `make presets`."""
    on_disk = {name: path.read_text(encoding="utf-8") for name, path in es.presets().items()}
    assert preset_files() == on_disk


@pytest.mark.parametrize("path", es.presets().values(), ids=lambda path: path.stem)
def test_headers(path: Path) -> None:
    """The modeline, a title, perhaps a remark, the source and the figures, no line too long."""
    header = path.read_text(encoding="utf-8").partition("schema_version")[0].splitlines()
    modeline, title, *_, source, counted, state = header
    assert modeline == "# yaml-language-server: $schema=../schemas/eulerstack-v1.json"
    assert (path.parent / modeline.partition("=")[2]).is_file()
    assert title.startswith("# ") and title.endswith(".") and source.startswith("# Source: ")
    assert re.fullmatch(r"# parameters: [\d.]+[MB]", counted)
    assert re.fullmatch(r"# state at 8k: [\d.]+ [KMG]iB", state)
    assert all(len(line) <= 120 for line in header)


def test_the_names_that_users_know_are_there() -> None:
    minis = [f"arch_{name}_mini" for name in ARCHS]
    wanted = {*TIERS, *(f"arch_{name}" for name in ARCHS), *minis}
    wanted |= {f"retnet_{size}{twin}" for size in ("1p3b", "2p7b", "6p7b") for twin in ("", "_attention")}
    assert wanted <= set(es.presets())
    assert sum(name.startswith("retnet_200m") for name in es.presets()) == 6


def test_counts_keep_the_promise_of_the_names() -> None:
    names = [name for name in es.presets() if promised(name)]
    assert len(names) == 25 + 6 + 6
    for name in names:
        assert parameters(name) == pytest.approx(promised(name), rel=0.1), name


def test_published_widths_give_the_published_counts() -> None:
    for name, published in PUBLISHED.items():
        assert parameters(name) == pytest.approx(published, rel=0.02), name


def test_a_twin_has_as_many_parameters() -> None:
    for size in ("1p3b", "2p7b", "6p7b"):
        assert parameters(f"retnet_{size}") == pytest.approx(parameters(f"retnet_{size}_attention"), rel=1e-3)


def test_a_mini_has_the_kinds_of_layers_of_its_stack() -> None:
    for name in (name for name, _ in generated() if name.endswith("_mini")):
        mini, full = es.load(name), es.load(name.removesuffix("_mini"))
        layers = [[(layer.mixer_type, layer.ffn.type) for layer in es.spec.expand(spec)] for spec in (mini, full)]
        assert set(layers[0]) == set(layers[1]), name
        assert len(layers[0]) <= 8 and parameters(name) < 20e6, name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MINIS]
)
@pytest.mark.usefixtures("one_thread")
def test_a_mini_learns_in_20_steps(name: str) -> None:
    """On one text of two phrases: the mean loss of the last five steps is below that of the first five."""
    torch.manual_seed(0)
    model = es.build(es.load(name))
    text = torch.tensor(list(b"the cat sat on the mat; a dog lay by the log. " * 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(20):
        rows = torch.stack([text[start : start + 65] for start in range(step, step + 64, 16)])
        loss, parts = model.losses(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts["cross_entropy"].item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
