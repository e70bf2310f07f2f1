"""`python -m benchmarks.mup`: does a learning rate carry over to other widths? With muP and without, for three mixers.

Each run is a line of results/mup.jsonl, and a run that has its line is not run again; `--report` writes results/mup.md
and mup.png of the lines that are there.
"""

import argparse
import json
import math
import warnings
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path
from typing import NamedTuple

import torch

import eulerstack as es
from eulerstack.training.data import Batch
from eulerstack.training.optim import make_optimizer, make_schedule

RESULTS = Path(__file__).parent / "results"
MIXERS = {"attention": {}, "retnet": {"value_expand": 1.0}, "mamba": {"d_state": 32}}
WIDTHS, BASE = (128, 256, 512), 128
RATES = tuple(2.0**-n for n in range(10, 4, -1))
LAYERS, HEADS, TOKENS, ROWS, BATCHES, STEPS = 2, 4, 128, 4, 8, 120
SCALE = 16.0  # of the embeddings, so that layers do not drown them
SEEDS = (0,)


class Run(NamedTuple):
    """At the base's width muP changes nothing: one run serves both."""

    mixer: str
    mup: bool
    width: int
    rate: float
    seed: int


def stack_of(run: Run) -> es.StackSpec:
    """A few layers of one mixer with gated MLPs of half the width.

    Wider attention has more heads, a wider retnet wider ones: its decays go by the head.
    """
    hints = {"lr_peak": run.rate, "schedule": "linear", "lr_floor_ratio": 0.0, "warmup_steps_ratio": 0.1}
    heads = HEADS * run.width // BASE if run.mixer == "attention" else HEADS
    builder = es.StackBuilder(run.width, heads, max_seq_len=TOKENS, mlp_ratio=0.5, training_hints=hints)
    builder.set(embedding={"scale": SCALE})
    if run.mup:
        builder.set(model={"mup": {"d_model": BASE, "n_heads": HEADS}})
    return builder.add(run.mixer, MIXERS[run.mixer], repeat=LAYERS).spec()


def batches(data: es.TextData, seed: int) -> list[Batch]:
    """The few that all runs of a seed train on again and again: what is measured is optimisation, not what was read."""
    loader = data.train_dataloader()
    loader.order.seed = seed
    return list(islice(loader, BATCHES))


def trained(run: Run, data: es.TextData) -> float:
    """The loss that is left after a run, in bits a byte; infinite where it blew up."""
    torch.manual_seed(run.seed)
    spec, text = stack_of(run), batches(data, run.seed)
    model, hints = es.build(spec), spec.training_hints
    optimizer = make_optimizer(model.named_parameters(), hints, mup=model.mup)
    schedule = make_schedule(optimizer, STEPS, hints)
    for batch in islice(cycle(text), STEPS):
        loss = model.losses(batch.tokens, batch.targets, batch.segments())[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hints.grad_clip or math.inf)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        left = [model.losses(b.tokens, b.targets, b.segments())[0].item() for b in text]
    bits = sum(left) / len(left) / math.log(2)
    return bits if math.isfinite(bits) else math.inf


def rates(mup: bool, width: int) -> tuple[float, ...]:
    """All at the base's width; the best there and its neighbours beyond it, and lower ones without muP."""
    if width == BASE:
        return RATES if mup else ()
    return RATES[1:5] if mup else RATES[:4]


def runs() -> Iterator[Run]:
    """Every point of the sweep, the cheap ones of a mixer first."""
    for seed, mixer, width, mup in product(SEEDS, MIXERS, WIDTHS, (True, False)):
        yield from (Run(mixer, mup, width, rate, seed) for rate in rates(mup, width))


def found(file: Path) -> dict[Run, float]:
    """The runs that have their line."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {Run(*line[:-1]): math.inf if line[-1] is None else line[-1] for line in lines}


def sweep(file: Path) -> None:
    """Train what has no line yet, a line as soon as it is known."""
    data = es.TextData(seq_len=TOKENS, batch_size=ROWS)
    data.setup()
    done = found(file)
    for run in runs():
        if run not in done:
            bits = trained(run, data)
            with file.open("a") as lines:
                lines.write(json.dumps([*run, bits if math.isfinite(bits) else None]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="train nothing, write what is known")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not options.report:
        sweep(RESULTS / "mup.jsonl")


if __name__ == "__main__":
    main()
