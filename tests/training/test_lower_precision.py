"""Training in bfloat16 keeps decays apart and loses little; what is fused is clipped in every precision."""

from pathlib import Path

import lightning as L
import pytest
import torch

import eulerstack as es
from eulerstack.mixers.retention import Retention
from eulerstack.training.data import TextData

from ..test_precision import ISLANDS
from .conftest import QUIET
from .test_module import fit

pytestmark = pytest.mark.usefixtures("lightnings_own_warnings")


def trained(precision: str, folder: Path, corpus: Path) -> tuple[es.StackModule, float]:
    """The mini with eight heads after 200 steps, and its held-out bits a byte."""
    L.seed_everything(0, verbose=False)
    module = es.StackModule("arch_expert_research_mini", settings=["model.n_heads=8"])
    trainer = L.Trainer(max_steps=200, precision=precision, default_root_dir=folder, **QUIET)  # type: ignore[arg-type]
    data = TextData(str(corpus), seq_len=32, batch_size=2, cache_dir=str(folder / "cache"))
    trainer.fit(module, data)
    (found,) = trainer.validate(module, data, verbose=False)
    return module, found["val_bits_per_byte"]


@pytest.mark.slow
def test_200_steps_in_bfloat16_end_where_float32_ends(tmp_path: Path, corpus: Path) -> None:
    _, wanted = trained("32-true", tmp_path, corpus)
    module, found = trained("bf16-true", tmp_path, corpus)
    assert abs(found / wanted - 1) < 0.05, (found, wanted)
    mixers = [block.mixer for block in module.model.blocks if isinstance(block.mixer, Retention)]
    for mixer in mixers:
        decays = mixer.decay(torch.zeros(1, 1, 256, dtype=torch.bfloat16)).exp().float()
        assert len(decays.unique()) == 8
        assert decays.max() < 1
    assert mixers


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_what_is_kept_in_float32_trains_in_float32_in_every_mixer(precision: str, corpus: Path, tmp_path: Path) -> None:
    settings = ["layer_templates.gated_retnet.mixer.retnet.gamma=learned", "model.d_model=64"]
    module = es.StackModule("every_mixer_mini", settings=settings, kernels="torch")
    trainer = L.Trainer(max_steps=2, precision=precision, default_root_dir=tmp_path, **QUIET)  # type: ignore[arg-type]
    data = TextData(str(corpus), seq_len=32, batch_size=2, cache_dir=str(tmp_path / "cache"))
    trainer.fit(module, data)
    found = {name: tensor for name, tensor in module.model.state_dict().items() if name.endswith(ISLANDS)}
    assert {name for name in ISLANDS if any(key.endswith(name) for key in found)} == set(ISLANDS)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(tensor.bfloat16().float().ne(tensor).any() for tensor in found.values())
    states = trainer.optimizers[0].state
    kept = {name: states[p] for name, p in module.model.named_parameters() if name.endswith(ISLANDS)}
    assert {state["exp_avg"].dtype for state in kept.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_norm_is_told_before_it_is_clipped(precision: str, stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    module, trainer = fit(stack_file, corpus, tmp_path, precision=precision, grad_clip=1e-3)
    assert trainer.optimizers[0].param_groups[0]["fused"]
    assert trainer.callback_metrics["grad_norm"] > 0.1
    left = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    assert left == pytest.approx(1e-3, rel=1e-2)
