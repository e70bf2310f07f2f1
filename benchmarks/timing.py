"""Interleaved timing: every model once a round in a drawn order, so that a drifting machine drifts for all."""

import random
import statistics
import time
from collections.abc import Callable

import torch

from eulerstack.kernels.provider import Target
from eulerstack.kernels.select import select


def interleaved(steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each step in each counted round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + warmup):
        for name, step in random.sample(list(steps.items()), len(steps)):
            start = time.perf_counter()
            step()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median over the rounds of how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def matmul_rates(size: int = 2048, rounds: int = 5) -> dict[str, float]:
    """FLOP/s of a square float32 product, what this machine can do: by torch.mm and by our linear operation."""
    a, linear = torch.randn(size, size), select("linear", Target()).kernels
    steps = {"torch.mm": lambda: torch.mm(a, a), "the linear operation": lambda: linear(a, (a,), (None,))}
    times = interleaved(steps, rounds)
    return {name: 2 * size**3 / statistics.median(taken) for name, taken in times.items()}
