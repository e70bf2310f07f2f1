"""The optimizer and the schedule of a stack's training hints."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..groups import ROUTER, decays, group_of, to_muon
from ..mup import STANDARD, MuP
from ..spec import TrainingHints

EPS = 1e-8  # Adam's, at muP's base


class Recipe(NamedTuple):
    """How one parameter is trained; those with the same recipe are one group of the optimizer."""

    muon: bool
    lr: float
    weight_decay: float


class MuonAndAdamW(torch.optim.Optimizer):
    """One optimizer of two: the groups and the state belong to both this one and the part that steps them."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = len(self.parts[0].param_groups)
        self.parts[0].param_groups, self.parts[1].param_groups = self.param_groups[:first], self.param_groups[first:]
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both parts' step; `closure` computes the loss and its gradients."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], hints: TrainingHints, fused: bool = True, mup: MuP = STANDARD
) -> torch.optim.Optimizer:
    """AdamW, or AdamW and Muon, over groups of parameters with the same recipe.

    mup: the stack's. Gradients shrink as its logits do, and Adam's epsilon with them.
    fused: AdamW's step in one kernel, which no gradient scaler of float16 can hand clipped gradients to.
    """
    kept: dict[Recipe, list[nn.Parameter]] = {}
    for name, parameter in named:
        kept.setdefault(recipe_of(name, parameter, hints, mup), []).append(parameter)
    adamw = torch.optim.AdamW(_groups(kept, muon=False), betas=hints.betas, eps=EPS * mup.shrunk, fused=fused)
    if hints.optimizer == "adamw":
        return adamw
    settings = hints.muon.model_dump(include={"momentum", "nesterov", "ns_steps"})
    return MuonAndAdamW(torch.optim.Muon(_groups(kept, muon=True), **settings), adamw)


def _groups(kept: dict[Recipe, list[nn.Parameter]], muon: bool) -> list[dict[str, Any]]:
    chosen = {recipe: params for recipe, params in kept.items() if recipe.muon == muon}
    return [{"params": params, "lr": r.lr, "weight_decay": r.weight_decay} for r, params in chosen.items()]


def recipe_of(name: str, parameter: nn.Parameter, hints: TrainingHints, mup: MuP = STANDARD) -> Recipe:
    """By the optimizer, then the first group whose glob matches; a router's learning rate by its multiplier as well.

    muP scales the learning rate, and undoes that in the decay: a step takes the same share of a weight at all widths.
    """
    muon = to_muon(name, parameter.dim(), hints.optimizer)
    lr, decay = (hints.muon.lr, hints.muon.weight_decay) if muon else (hints.lr_peak, hints.weight_decay)
    group = group_of(name, hints.optimizer_groups)
    if group is not None:
        lr, decay = lr * group.lr_multiplier, decay if group.weight_decay is None else group.weight_decay
    if name.endswith(ROUTER):
        lr *= hints.router_lr_multiplier
    scale = mup.of(name).muon if muon else mup.of(name).adamw
    return Recipe(muon, lr * scale, decay / scale if decays(name) else 0.0)


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, hints: TrainingHints) -> LambdaLR:
    """From 0 to each peak over the warm-up, then by `hints.schedule` down to the floor's share of it."""
    rising, floor = max(1, round(hints.warmup_steps_ratio * steps)), hints.lr_floor_ratio
    start, fall = rising, FALLS[hints.schedule]
    if hints.schedule == "wsd":
        start = max(rising, steps - round(hints.decay_steps_ratio * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        through = min(1.0, max(0, step - start) / max(1, steps - start))
        return floor + (1 - floor) * fall(through)

    return LambdaLR(optimizer, factor)


def follow(schedule: object) -> None:
    """Set the learning rates that a schedule has at the step it is at; it may be as long as another run's no more."""
    if isinstance(schedule, LambdaLR):
        rates = [
            base * of(schedule.last_epoch) for base, of in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates


FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda through: 0.5 * (1 + math.cos(math.pi * through)),
    "linear": lambda through: 1 - through,
    "wsd": lambda through: 1 - through,
    "constant": lambda through: 1.0,
}
"""What is left of the learning rate above its floor, by the share of the fall that is through."""
