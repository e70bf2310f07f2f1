"""StackModule in a plain Trainer: what decays, what clips, what a run leaves."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import eulerstack as es
from eulerstack.groups import decays
from eulerstack.training.callbacks import draw_loss

from .conftest import QUIET

pytestmark = [
    pytest.mark.usefixtures("lightnings_own_warnings"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
]


def fit(
    stack_file: Path, corpus: Path, tmp_path: Path, steps: int = 3, precision: str = "32-true", **options: Any
) -> tuple[es.StackModule, L.Trainer]:
    L.seed_everything(0, verbose=False)
    module = es.StackModule(str(stack_file), **options)
    trainer = L.Trainer(max_steps=steps, precision=precision, default_root_dir=tmp_path, limit_val_batches=2, **QUIET)  # type: ignore[arg-type]
    trainer.fit(module, es.TextData(str(corpus), seq_len=32, batch_size=4, cache_dir=str(tmp_path / "cache")))
    return module, trainer


def test_decay_is_by_name() -> None:
    model = es.estimate(es.load("arch_expert_research_mini")).stack
    bare = {name.rpartition("mixer.")[2] for name, _ in model.named_parameters() if not decays(name)}
    kept = {"scan.A_log", "scan.D", "scan.dt_bias", "x_conv.bias", "B_conv.bias", "C_conv.bias"}
    assert {name for name in bare if "norm" not in name} == kept
    assert all(decays(n) for n, p in model.named_parameters() if n.endswith("proj.weight") or n == "embedding.weight")


def test_plain_trainer_learns(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    _, trainer = fit(stack_file, corpus, tmp_path, steps=40, lr_peak=1e-2)
    assert float(trainer.callback_metrics["bits_per_byte"]) < 5
    assert trainer.optimizers[0].param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_islands_survive_lightnings_precisions(stack_file: Path, corpus: Path, tmp_path: Path, precision: str) -> None:
    module, _ = fit(stack_file, corpus, tmp_path, precision=precision)
    for name, weight in module.model.named_parameters():
        island = name.endswith(("A_log", "D", "dt_bias"))
        assert weight.dtype == (torch.float32 if island or precision == "bf16-mixed" else torch.bfloat16), name


def test_hints_act_and_arguments_win(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    stack_file.write_text(
        stack_file.read_text()
        + "training_hints: {lr_peak: 1e-3, betas: [0.8, 0.9], weight_decay: 0.3, grad_clip: 0.5}\n"
    )
    module, trainer = fit(stack_file, corpus, tmp_path)
    groups = trainer.optimizers[0].param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert groups[0]["betas"] == (0.8, 0.9)
    assert groups[0]["initial_lr"] == 1e-3
    assert module.spec.training_hints.grad_clip == 0.5
    module, trainer = fit(stack_file, corpus, tmp_path, lr_peak=1e-4, weight_decay=0.0, grad_clip=0.0)
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 1e-4
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.0
    assert module.spec.training_hints.grad_clip is None
    with pytest.raises(es.SpecError, match=r"training_hints\.warmup_steps_ratio"):
        es.StackModule(str(stack_file), warmup_steps_ratio=7)


def test_gradients_are_clipped_to_the_hint_or_the_trainers_value(
    stack_file: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []

    def note(self: es.StackModule, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    monkeypatch.setattr(es.StackModule, "on_before_zero_grad", note)
    fit(stack_file, corpus, tmp_path, grad_clip=0.01)
    assert max(norms[1:]) == pytest.approx(0.01, rel=1e-3)
    monkeypatch.setitem(QUIET, "gradient_clip_val", 0.02)
    norms.clear()
    fit(stack_file, corpus, tmp_path, grad_clip=0.01)
    assert max(norms[1:]) == pytest.approx(0.02, rel=1e-3)


MOE = "ffn: {type: moe, moe: {experts: 4, bias_correction: {update_rate: 0.5}, z_loss: 0.01}}"


@pytest.mark.parametrize("accumulated", [1, 3])
def test_routers_are_logged_and_balanced_once_a_step(
    stack_file: Path, corpus: Path, tmp_path: Path, accumulated: int
) -> None:
    stack_file.write_text(stack_file.read_text().replace("ffn: {type: gated_mlp}", MOE))
    L.seed_everything(0, verbose=False)
    module, calls = es.StackModule(str(stack_file)), []
    trainer = L.Trainer(max_steps=3, accumulate_grad_batches=accumulated, default_root_dir=tmp_path, **QUIET)
    data = es.TextData(str(corpus), seq_len=32, batch_size=4, cache_dir=str(tmp_path / "cache"))
    rebalance = module.model.rebalance
    module.model.rebalance = lambda loads: (calls.append(loads), rebalance(loads))  # type: ignore[method-assign,assign,func-returns-value]
    trainer.fit(module, data)
    logged = trainer.callback_metrics
    assert {"load_balance", "router_z", "router_busiest/0", "router_busiest/2"} <= logged.keys()
    assert logged["router_busiest/1"] >= 1
    assert len(calls) == 3
    for loads in calls:  # every token of every accumulated batch chose two experts
        assert {int(load.sum()) for load in loads.values()} == {2 * accumulated * 4 * 32}
    biases = [b for name, b in module.model.named_buffers() if name.endswith("correction.bias")]
    assert len(biases) == 3
    for bias in biases:
        assert (bias.abs() % 0.5 == 0).all()
        assert 0 < bias.abs().max() <= 1.5


def test_every_epoch_trains_on_every_batch(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    module = es.StackModule(str(stack_file))
    data = es.TextData(str(corpus), seq_len=32, batch_size=16, cache_dir=str(tmp_path / "cache"))
    trainer = L.Trainer(max_epochs=3, limit_val_batches=1, **QUIET)
    trainer.fit(module, data)
    hints = module.spec.training_hints
    assert trainer.global_step == 3 * len(data.train_dataloader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(hints.lr_peak * hints.lr_floor_ratio, rel=0.02)
    trainer = L.Trainer(max_epochs=2, limit_val_batches=1, limit_train_batches=3, **QUIET)
    trainer.fit(module, data)
    assert trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(hints.lr_peak * hints.lr_floor_ratio, rel=0.02)


def test_a_batch_without_targets_has_no_loss(stack_file: Path) -> None:
    model = es.StackModule(str(stack_file)).model
    total, _ = model.losses(torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), -100))
    assert total.item() == 0


def test_packed_loss_is_that_of_separate_documents(stack_file: Path) -> None:
    model = es.StackModule(str(stack_file)).model.double()
    tokens = torch.randint(0, 256, (1, 30))
    targets = torch.randint(0, 256, (1, 30))
    document = torch.tensor([[0] * 12 + [1] * 18])
    packed, _ = model.losses(tokens, targets, es.Segments(document=document))
    parts = [
        model.losses(a, b)[0] * a.shape[1]
        for a, b in zip(tokens.split([12, 18], 1), targets.split([12, 18], 1), strict=True)
    ]
    assert packed.item() == pytest.approx(sum(p.item() for p in parts) / 30, rel=1e-6)


def test_checkpoints_keep_weights_and_refuse_strangers(stack_file: Path, tmp_path: Path) -> None:
    model = es.build(es.load(stack_file))
    es.save_checkpoint(model, tmp_path / "c")
    es.save_checkpoint(model, tmp_path / "c")  # writing over a checkpoint replaces it whole
    again = es.load_checkpoint(tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert es.load(tmp_path / "c") == model.spec
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".c")) == []
    warm = es.StackModule(str(tmp_path / "c"))
    assert torch.equal(warm.model.embedding.weight, model.embedding.weight)
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="is no checkpoint"):
        es.save_checkpoint(model, tmp_path / "precious")
    with pytest.raises(ValueError, match="is no checkpoint"):
        es.load_checkpoint(tmp_path / "precious")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="do not fit"):
        es.load_checkpoint(tmp_path / "c")


def test_the_loss_curve_joins_the_logs_of_resumed_runs(tmp_path: Path) -> None:
    logs = [tmp_path / "logs" / f"version_{v}" for v in (0, 1, 10)]
    assert draw_loss(tmp_path, logs) is None
    for version, steps in ((0, (0, 10, 20)), (1, (20, 30)), (10, (40,))):
        folder = tmp_path / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        rows = [f"{s},{5 - s / 20}," for s in steps]
        (folder / "metrics.csv").write_text("\n".join(["step,bits_per_byte,val_bits_per_byte", *rows]) + "\n")
    picture = draw_loss(tmp_path, logs)
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_drops_what_one_that_never_stopped_does(stack_file: Path, corpus: Path, tmp_path: Path) -> None:
    hints = {"optimizer": "hybrid", "schedule": "constant", "dropout": 0.3, "checkpointing": "block"}

    def run(steps: int, resume: Path | None = None) -> tuple[list[torch.Tensor], L.Trainer]:
        if resume is None:
            L.seed_everything(0, verbose=False)
        module = es.StackModule(str(stack_file), warmup_steps_ratio=0.0, **hints)  # type: ignore[arg-type]
        trainer = L.Trainer(max_steps=steps, default_root_dir=tmp_path, limit_val_batches=0, **QUIET)
        data = es.TextData(str(corpus), seq_len=32, batch_size=4, cache_dir=str(tmp_path / "cache"))
        trainer.fit(module, data, ckpt_path=resume, weights_only=False)
        return [weight.detach() for weight in module.model.parameters()], trainer

    straight, _ = run(6)
    run(3)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(6, tmp_path / "half.ckpt")
    assert all(map(torch.equal, resumed, straight))
