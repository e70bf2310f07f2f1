"""StackModule: a stack as a plain LightningModule."""

import math
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import lightning as L
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from lightning.pytorch.trainer.connectors.data_connector import _process_dataloader
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from ..checkpoint import load_weights, reading, stack_of_run
from ..layers.share import WHOLE, Share
from ..model import Stack, build, outline
from ..paths import expand_home
from ..segments import IGNORED
from ..spec import StackSpec, TrainingHints, differ, dump, load, loads, spec_of, with_hints
from ..stored import check_checkpoint
from .accumulation import Accumulation, StepFetcher, count
from .carry import Carry
from .compiling import compile_blocks
from .data import Batch
from .optim import follow, make_optimizer, make_schedule
from .resuming import KEY, Beginning, check_options, left_to_do, options_of
from .sharded import Sides, shard


class StackModule(L.LightningModule):
    """Trains a stack on batches of `Batch`.

    Args:
        spec: a YAML file, a preset's name, a StackSpec, or a checkpoint directory, whose weights are loaded.
        init: `mixer` draws each mixer's weights as its paper does, `normal` linear weights from N(0, 0.02). This and
            all below but the last three are the spec's training_hints unless given.
        dropout: share of what each sublayer adds to the residual stream.
        checkpointing: `block` computes each layer again in the backward, for less memory, `selective` all but products
            by weights and attention; `none` nothing.
        router_aux_loss_coef: load_balance_coef of each mixture of experts without its own.
        optimizer: `adamw`, `hybrid` (Muon for the hidden matrices) or `muon` (for every matrix).
        lr_peak: AdamW's learning rate after warm-up.
        betas: AdamW's.
        weight_decay: AdamW's, on matrices and embeddings only.
        muon: Muon's lr, momentum, nesterov, ns_steps and weight_decay.
        router_lr_multiplier: on the learning rate of routers.
        optimizer_groups: a list of {match, lr_multiplier, weight_decay}; `match` is a glob over parameters' names.
        z_loss: weight of the mean square of log Z, the softmax's divisor; 1e-4 keeps logits from drifting.
        grad_clip: largest gradient norm; 0 for none. The Trainer's gradient_clip_val wins.
        schedule: `cosine`, `linear`, `constant` or `wsd`.
        warmup_steps_ratio: share of the steps that warm up.
        lr_floor_ratio: the last learning rate, as a share of the peak.
        decay_steps_ratio: share of the steps that decay in `wsd`.
        kernels: provider of the mixers' kernels.
        compile: compile each layer by torch.compile; on a CPU with kernels `torch`, and a C++ compiler.
        settings: KEY=VALUE each, changes of the spec's file before it is checked, as in `load`.

    Raises SpecError for values that the language refuses, and ValueError for groups that match nothing.
    """

    def __init__(
        self,
        spec: str | Path | StackSpec,
        init: str | None = None,
        dropout: float | None = None,
        checkpointing: str | None = None,
        router_aux_loss_coef: float | None = None,
        optimizer: str | None = None,
        lr_peak: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        muon: dict[str, Any] | None = None,
        router_lr_multiplier: float | None = None,
        optimizer_groups: list[dict[str, Any]] | None = None,
        z_loss: float | None = None,
        grad_clip: float | None = None,
        schedule: str | None = None,
        warmup_steps_ratio: float | None = None,
        lr_floor_ratio: float | None = None,
        decay_steps_ratio: float | None = None,
        kernels: str = "auto",
        compile: bool = False,  # noqa: A002 - the option's name
        settings: list[str] | None = None,
    ) -> None:
        given = {key: value for key, value in locals().items() if key in TrainingHints.model_fields}
        super().__init__()
        self.changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if grad_clip == 0:
            self.changes["grad_clip"] = None
        spec, self.weights = _spec_and_weights(spec, settings or [])
        self.spec = with_hints(spec, self.changes)
        self.kernels, self.compiled = kernels, compile
        self.ranks = WHOLE  # this process among those that read different rows of a batch
        self._built: Stack | None = None
        self._seed = torch.initial_seed()
        self._loads: dict[int, Tensor] = {}
        self._carry = Carry()
        self._step = Accumulation()
        self._beginning = Beginning()
        self._drawn = self.weights is None  # whether no number has been learned yet
        if self.spec.training_hints.optimizer_groups:
            build(self.spec, "meta", kernels=kernels)  # refuses groups that match nothing before any data are read
        self.save_hyperparameters(self._hyperparameters())

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str = "cpu",
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **options: Any,
    ) -> Self:
        """The stack of a run's resume/last.ckpt with its weights; `options` are the module's, by default the run's.

        Only weights are read, whatever `weights_only` says. Raises ValueError for a file that holds no stack.
        """
        if hparams_file is not None:
            raise ValueError(f"hparams_file = {hparams_file!r}: a run's file holds its own stack; leave it out")
        stack = stack_of_run(Path(checkpoint_path), torch.get_default_dtype())
        module = cls(**{"spec": stack.spec, **options})
        module.model.load_state_dict(stack.state_dict(), strict=strict is not False)
        module._drawn = False
        return module.to(map_location)

    def _hyperparameters(self) -> dict[str, Any]:
        """What loggers write down at the beginning of a run."""
        hints = self.spec.training_hints.model_dump(mode="json", exclude={"seed"})
        own = {"name": self.spec.model.name, "kernels": self.kernels, "compile": self.compiled, "seed": self._seed}
        return {**own, **hints, "spec": dump(self.spec)}

    @property
    def lr(self) -> float:
        """The peak learning rate, by the name that Lightning's learning-rate finder sets; Muon's stays."""
        return self.spec.training_hints.lr_peak

    @lr.setter
    def lr(self, rate: float) -> None:
        self.changes["lr_peak"] = rate
        self.spec = with_hints(self.spec, {"lr_peak": rate})

    @property
    def model(self) -> Stack:
        """The stack; built on first use, in the dtype that Lightning's precision asks for."""
        self.configure_model()
        assert self._built is not None
        return self._built

    def setup(self, stage: str) -> None:
        """All ranks draw as the first would. Raises ValueError for a strategy that is not known to train a stack."""
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1 and not isinstance(strategy, DDPStrategy | ModelParallelStrategy):
            raise ValueError(f"strategy {type(strategy).__name__} does not train a stack; give ddp or fsdp2")
        self.ranks = _ranks(strategy)
        self._seed = strategy.broadcast(self._seed)
        if stage == "fit":
            limits = {"max_steps": self.trainer.max_steps, "max_epochs": self.trainer.max_epochs}
            self.save_hyperparameters({**self._hyperparameters(), **options_of(self.trainer), **limits})
        torch.set_rng_state(strategy.broadcast(torch.get_rng_state()))
        if strategy.root_device.type == "cuda":
            torch.cuda.set_rng_state(strategy.broadcast(torch.cuda.get_rng_state()))

    def configure_model(self) -> None:
        if self._built is not None:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        self._built = self._sharded(strategy) if isinstance(strategy, ModelParallelStrategy) else self._whole(strategy)
        if self.compiled:
            compile_blocks(self._built)

    def _whole(self, strategy: Strategy | None) -> Stack:
        device = "cpu" if strategy is None else strategy.root_device
        stack = build(self.spec, device, torch.get_default_dtype(), self.kernels)
        if self.weights is not None:
            load_weights(stack, self.weights)
        return stack

    def _sharded(self, strategy: ModelParallelStrategy) -> Stack:
        """Under bf16-mixed the sharded matrices travel in bfloat16, and are kept in float32."""
        stack = outline(self.spec, strategy.root_device, torch.get_default_dtype(), self.kernels)
        compute = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        with nullcontext() if self.weights is None else reading(stack, self.weights) as fill:
            shard(stack, strategy.device_mesh, strategy.root_device, fill, compute)
        return stack

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of `Stack.losses` over a sequence, on all the devices that hold the stack together."""
        return self._together.flops(tokens, training=True)

    @cached_property
    def _together(self) -> Stack:
        """The stack, or where devices split its layers, an outline of what they split."""
        split = self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)
        return build(self.spec, "meta", kernels=self.kernels) if split else self.model

    def _average(self, count: Tensor) -> Tensor:
        """The mean over the ranks that share a batch; no gradient."""
        ranks = self.ranks
        if ranks.of == 1:
            return count
        mean = count.detach().clone() if count.is_floating_point() else count.double()
        mean = mean.to(self.device)
        dist.all_reduce(mean, group=ranks.group)
        return mean / ranks.of

    def whole_weights(self) -> dict[str, Tensor]:
        """The stack's weights, from all ranks, which must all ask; where they are sharded, for the first alone."""
        if any(isinstance(p, DTensor) for p in self.model.parameters()):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return cast(dict[str, Tensor], get_model_state_dict(self.model, options=options))
        return self.model.state_dict()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits

    def on_train_start(self) -> None:
        """A resumed run goes on in the middle of an epoch, and perhaps to another last step."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(self.trainer)
        self._read_steps()
        self._drawn = False
        if self.trainer.ckpt_path is not None:
            for config in self.trainer.lr_scheduler_configs:
                follow(config.scheduler)

    def on_train_epoch_start(self) -> None:
        """Lightning may have set up the loader anew, and a callback may have changed how many batches are a step."""
        self._read_steps()

    def _read_steps(self) -> None:
        """Where batches are accumulated, those of a step are read together, and counted."""
        loop = self.trainer.fit_loop
        if self.trainer.accumulate_grad_batches > 1 and not isinstance(loop._data_fetcher, StepFetcher):
            loop._data_fetcher = StepFetcher(self.trainer, self._begin_step)

    def _begin_step(self, batches: list[Batch]) -> None:
        self._step.begin([count(batch, len(self.model.ahead)) for batch in batches])

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """What a batch drops depends on the run's seed and the batch's number only: a resumed run drops the same."""
        own = self.ranks.rank << 40
        torch.manual_seed((self._seed + own + self.trainer.fit_loop.total_batch_idx) % (1 << 63))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if batch.reach:
            loss, parts = self._carry.losses(self.model, batch, self._average, self.ranks)
        else:
            loss, parts = self.model.losses(batch.tokens, batch.targets, batch.segments(), self._average)
        seen, accumulated = loss.detach(), self.trainer.accumulate_grad_batches
        if accumulated > 1:
            loss, means = self._step.weighted(parts, self._average)
            loss, seen = loss * accumulated, torch.stack(list(means.values())).sum()  # Lightning divides by as many
            parts = {**parts, **means}
        self._note(seen, parts, batch)
        return loss

    def _note(self, loss: Tensor, parts: dict[str, Tensor], batch: Batch) -> None:
        """Log the losses; of accumulated batches those of the step so far."""
        rows = batch.tokens.shape[0]
        self._note_routing(parts, rows)
        total, entropy = self._average(torch.stack([loss, parts["cross_entropy"].detach()]))
        self.log("loss", total, prog_bar=True, batch_size=rows)
        self.log("bits_per_byte", entropy / math.log(2) / batch.bytes_per_token, prog_bar=True, batch_size=rows)

    def _note_routing(self, parts: dict[str, Tensor], rows: int) -> None:
        """Log the other losses and the routers' busiest experts' share (1: balanced); keep the loads for the step."""
        for name, part in parts.items():
            if name in ("load_balance", "router_z", "multi_token", "z"):
                self.log(name, part.detach(), batch_size=rows)
            if name.startswith("router_load/"):
                layer = int(name.rpartition("/")[2])
                self._loads[layer] = load = part + self._loads.get(layer, 0)
                self.log(f"router_busiest/{layer}", load.max() / load.mean().clamp(min=1), batch_size=rows)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Router biases move once a step, by the loads of all its batches."""
        self.model.rebalance({layer: self._average(load) for layer, load in self._loads.items()})
        self._loads = {}

    def on_train_epoch_end(self) -> None:
        self._beginning.epoch_ended(self.trainer)

    def on_validation_start(self) -> None:
        self._beginning.started(self.trainer)

    def validation_step(self, batch: Batch, index: int) -> None:
        self._measure("val_bits_per_byte", batch)

    def on_test_start(self) -> None:
        """Raises ValueError where nothing was trained."""
        if self._drawn and self.trainer.ckpt_path is None:
            raise ValueError("this stack has freshly drawn weights: give --checkpoint DIR, the folder that `fit` wrote")

    def test_step(self, batch: Batch, index: int) -> None:
        self._measure("held_out_bits_per_byte", batch)

    def _measure(self, name: str, batch: Batch) -> None:
        """Log the mean over predicted tokens, weighted by how many each batch has."""
        count = int((batch.targets != IGNORED).sum())
        if count == 0 and self.trainer.world_size == 1:
            return  # several ranks meet to take the mean
        _, parts = self.model.losses(batch.tokens, batch.targets, batch.segments())
        bits = parts["cross_entropy"] / math.log(2) / batch.bytes_per_token
        self.log(name, bits, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        hints = self.spec.training_hints
        fused = self.trainer.precision != "16-mixed"
        optimizer = make_optimizer(self.model.named_parameters(), hints, fused, self.model.mup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """The norm is logged as it was before. Lightning's own clipping refuses fused optimizers."""
        chosen = self.spec.training_hints.grad_clip if gradient_clip_val is None else gradient_clip_val
        by_value, most = gradient_clip_algorithm == "value", chosen or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters(), math.inf if by_value else most)
        self.log("grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if by_value:
            nn.utils.clip_grad_value_(self.parameters(), most)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stack"] = dump(self.spec)
        fetcher = self.trainer.fit_loop._data_fetcher
        if isinstance(fetcher, StepFetcher) and fetcher.place:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = fetcher.place
        checkpoint[KEY] = left_to_do(self.trainer)
        checkpoint["trainer"] = options_of(self.trainer)
        checkpoint["router_loads"] = self._loads
        checkpoint["seed"] = self._seed
        checkpoint["carried"] = self._carry.saved(self.ranks)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the run to resume had another stack, another recipe, or other Trainer options."""
        self.check_same(checkpoint)
        self._loads, self._seed = checkpoint["router_loads"], checkpoint["seed"]
        self._carry.restore(checkpoint.get("carried"))
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_options(checkpoint.get("trainer", {}), self.trainer)
            self._beginning.begin(self.trainer, checkpoint)

    def check_same(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the run of a checkpoint had another stack, or another recipe."""
        was = loads(checkpoint["stack"])
        if was == self.spec:
            return
        what = "recipe" if was.model_copy(update={"training_hints": self.spec.training_hints}) == self.spec else "stack"
        raise ValueError(
            f"the run to resume trained with another {what} than this spec and these --model options: "
            f"{differ(was, self.spec)}; resume with those it started with, or start a new run from its checkpoint/"
        )

    def _schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Over the run's optimizer steps. Raises ValueError where neither these nor an epoch's have a number."""
        hints, steps = self.spec.training_hints, self._steps()
        timed = any(isinstance(callback, Timer) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if math.isinf(steps) and timed:
            steps = self._steps_of_an_epoch()
            if hints.schedule != "constant" and not math.isinf(steps):
                rank_zero_warn(
                    f"max_time alone does not say how many steps the run has, which schedule = {hints.schedule} falls "
                    "over: the learning rate warms up over an epoch's share and stays; give trainer.max_steps as well"
                )
            hints = hints.model_copy(update={"schedule": "constant"})
        if math.isinf(steps):
            raise ValueError("the learning rate's schedule needs the run's length: give trainer.max_steps")
        return make_schedule(optimizer, int(steps), hints)

    def _steps(self) -> float:
        """Optimizer steps of the whole run: the length of the schedule. Infinite where only time ends it."""
        epochs, last = self.trainer.max_epochs, self._beginning.max_steps(self.trainer)
        by_epochs = epochs * self._steps_of_an_epoch() if epochs is not None and epochs > 0 else math.inf
        return min(by_epochs, last if last > 0 else math.inf)

    def _steps_of_an_epoch(self) -> float:
        """Infinite for a loader without a length.

        Lightning's own estimate sets the loader up, too early to find its place in a run that resumes.
        """
        trainer, stage = self.trainer, (TrainerFn.FITTING, RunningStage.TRAINING)
        loaders = CombinedLoader(trainer.fit_loop._data_source.dataloader(), "max_size_cycle").flattened
        lengths = [sized_len(_process_dataloader(trainer, *stage, loader)) for loader in loaders]
        batches = max(math.inf if length is None else length for length in lengths)
        limit = 1.0 if trainer.limit_train_batches is None else trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else batches * limit
        return batches if math.isinf(batches) else math.ceil(int(batches) / trainer.accumulate_grad_batches)


def _ranks(strategy: Strategy) -> Share:
    """This process among those that read different rows of a batch."""
    if isinstance(strategy, ModelParallelStrategy):
        return Sides.of(strategy.device_mesh).data
    return Share(strategy.global_rank, strategy.world_size) if isinstance(strategy, ParallelStrategy) else WHOLE


def _spec_and_weights(spec: str | Path | StackSpec, settings: list[str]) -> tuple[StackSpec, Path | None]:
    if isinstance(spec, StackSpec):
        if settings:
            raise ValueError("settings change a file's values; change the StackSpec itself, or give its file")
        return spec, None
    if not isinstance(spec, str | Path):
        return spec_of(spec), None
    place = expand_home(spec)
    if place.is_dir():
        check_checkpoint(place)
        return load(place, settings), place
    return load(spec, settings), None
