"""Peak memory of one training step, in a process of its own: `python -m benchmarks.memory MODEL TOKENS` (Linux)."""

import subprocess
import sys
import warnings
from pathlib import Path

import torch

from .peers import MODELS, VOCAB


def peak(name: str, tokens: int) -> float:
    """MB that a step of batch 1 adds to what the built model holds."""
    words = [sys.executable, "-m", "benchmarks.memory", name, str(tokens)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _step(name: str, tokens: int) -> float:
    model = MODELS[name]()
    model.loss(torch.randint(0, VOCAB, (1, 65))).backward()  # imports, compiled loops, gradients
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _megabytes("VmRSS")
    model.loss(torch.randint(0, VOCAB, (1, tokens + 1))).backward()
    return _megabytes("VmHWM") - before


def _megabytes(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    print(_step(sys.argv[1], int(sys.argv[2])))
