"""What a run tells of its mixers, and that telling changes nothing."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import eulerstack as es
from eulerstack.mixers.retention import log_gamma
from eulerstack.segments import Segments
from eulerstack.training.diagnostics import Diagnostics, diagnose

from .conftest import QUIET

pytestmark = pytest.mark.usefixtures("lightnings_own_warnings")

TEXT = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))


def test_decays_are_the_formulas_and_states_those_of_the_forms() -> None:
    model = es.build(es.load("arch_expert_research_mini"), dtype=torch.float64)
    found, state = diagnose(model, TEXT), model.chunkwise(TEXT, model.init_state(1, 40))[1]
    gamma = log_gamma("eq8", 4).exp()
    assert found["decay_least/1"] == pytest.approx(gamma.min().item())
    assert found["decay_most/3"] == pytest.approx(gamma.max().item())
    kv = state.layers[3].tensors()["kv"]
    assert found["kv_rms/3"] == pytest.approx(kv.square().mean().sqrt().item())


def test_every_mixer_tells_of_itself() -> None:
    model = es.build(es.load("every_mixer_mini"), dtype=torch.float64)
    found, kinds = diagnose(model, TEXT), [type(block.mixer).__name__ for block in model.blocks]
    for i, kind in enumerate(kinds):
        if kind in ("Mamba1", "Mamba2"):
            assert 0 < found[f"dt_least/{i}"] <= found[f"dt_median/{i}"] <= found[f"dt_most/{i}"]
            assert 0 <= found[f"decay_least/{i}"] < found[f"decay_most/{i}"] < 1
            assert found[f"ssm_rms/{i}"] > 0
    told = {kinds[int(name.rpartition("/")[2])] for name in found}
    assert told >= set(kinds) - {"Attention", "LatentAttention", "Hyena"}


def test_states_after_packed_documents_are_those_of_the_last() -> None:
    model = es.build(es.load("arch_expert_research_mini"), dtype=torch.float64)
    packed = diagnose(model, TEXT, torch.tensor([[0] * 25 + [1] * 15]))
    alone = diagnose(model, TEXT[:, 25:])
    for name in ("ssm_rms/0", "kv_rms/1"):
        assert packed[name] == pytest.approx(alone[name], rel=1e-10)


def test_it_leaves_the_model_as_it_was() -> None:
    model = es.build(es.load("every_mixer_mini", ["training_hints.dropout=0.3"])).train()
    before = torch.get_rng_state()
    diagnose(model, TEXT)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_run_is_told_of_every_so_many_steps_and_is_the_same(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    trained = []
    for every in (0, 3):
        L.seed_everything(0, verbose=False)
        module = es.StackModule(str(stack_file))
        options = {
            **QUIET,
            "callbacks": [Diagnostics(every)] if every else [],
            "logger": CSVLogger(tmp_path, f"{every}"),
        }
        trainer = L.Trainer(max_steps=7, accumulate_grad_batches=2, default_root_dir=tmp_path, **options)
        trainer.fit(module, es.TextData(str(corpus), seq_len=32, batch_size=2, cache_dir=str(tmp_path / "cache")))
        trained.append(torch.cat([p.flatten() for p in module.parameters()]))
    assert torch.equal(*trained)
    rows = [line.split(",") for line in (tmp_path / "3" / "version_0" / "metrics.csv").read_text().splitlines()]
    step, decay = rows[0].index("step"), rows[0].index("decay_median/1")
    assert [int(row[step]) for row in rows[1:] if row[decay]] == [2, 5]


def test_never_is_not_a_number_of_steps() -> None:
    with pytest.raises(ValueError, match="every -1 steps"):
        Diagnostics(-1)


def test_a_mixer_that_tells_nothing_may(stack_file: Path) -> None:
    mixer = es.build(es.load("arch_beginner_llama_mini")).blocks[0].mixer
    assert mixer.dynamics(torch.zeros(1, 3, 8), Segments.dense(3)) == {}
