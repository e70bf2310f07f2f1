"""AdamW with weight decay by name, and a learning rate that warms up and falls along a cosine."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

UNDECAYED = ("bias", "A_log", "D", "dt_bias", "gamma", "sinks", "decay", "bonus", "mix_k", "mix_v", "mix_r")


def decays(name: str) -> bool:
    """Whether a parameter decays: all but biases, norms, decays and mixes. By name: marks on tensors get lost."""
    *owners, last = name.split(".")
    return last not in UNDECAYED and not any(owner.endswith("norm") for owner in owners)


def adamw(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Two groups: what decays, and what does not."""
    parameters = list(named)
    groups = [
        {"params": [p for name, p in parameters if decays(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters if not decays(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float, floor: float) -> LambdaLR:
    """From 0 to the peak over `warmup` * steps, then along half a cosine to `floor` * peak."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        through = min(1.0, (step - rising) / max(1, steps - rising))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * through))

    return LambdaLR(optimizer, factor)
