"""Interleaved timing: every model once a round in a drawn order, so that a drifting machine drifts for all."""

import random
import statistics
import time
from collections.abc import Callable

import torch


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


def matmul_rate(size: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of a square float32 product: what this machine can do."""
    a = torch.randn(size, size)
    times = interleaved({"matmul": lambda: a @ a}, rounds)["matmul"]
    return 2 * size**3 / statistics.median(times)
