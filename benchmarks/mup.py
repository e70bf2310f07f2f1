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
from typing import Any, NamedTuple

import torch

import eulerstack as es
from eulerstack.training.data import Batch
from eulerstack.training.optim import make_optimizer, make_schedule

RESULTS = Path(__file__).parent / "results"
MIXERS: dict[str, dict[str, Any]] = {"attention": {}, "retnet": {"value_expand": 1.0}, "mamba": {"d_state": 32}}
WIDTHS, BASE = (128, 256, 512), 128
RATES = tuple(2.0**-n for n in range(10, 4, -1))
LAYERS, HEADS, TOKENS, ROWS, BATCHES = 2, 4, 128, 4, 8
STEPS = {"attention": 120, "retnet": 60, "mamba": 60}  # attention is slower to leave the plateau of bigrams
SCALE = 16.0  # of the embeddings, so that layers do not drown them
SEEDS, WARM = (0,), 0.1


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
    hints = {"lr_peak": run.rate, "schedule": "linear", "lr_floor_ratio": 0.0, "warmup_steps_ratio": WARM}
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
    schedule = make_schedule(optimizer, STEPS[run.mixer], hints)
    for batch in islice(cycle(text), STEPS[run.mixer]):
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


def rates(mixer: str, mup: bool, width: int) -> tuple[float, ...]:
    """All at the base's width; around its best beyond it, and lower ones without muP; mamba's are higher."""
    if width == BASE:
        return RATES if mup else ()
    up = mixer == "mamba"
    return RATES[2 + up : 5 + up] if mup else RATES[up : 3 + up]


def runs() -> Iterator[Run]:
    """Every point of the sweep, the cheap ones of a mixer first."""
    for seed, mixer, width, mup in product(SEEDS, MIXERS, WIDTHS, (True, False)):
        yield from (Run(mixer, mup, width, rate, seed) for rate in rates(mixer, mup, width))


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


Curve = dict[float, float]


def curves(done: dict[Run, float], mixer: str, mup: bool) -> dict[int, Curve]:
    """Bits by learning rate, the mean over seeds, of each width; the base's serve both ways."""
    found: dict[int, dict[float, list[float]]] = {}
    for run, bits in done.items():
        if run.mixer == mixer and (run.mup == mup or run.width == BASE):
            found.setdefault(run.width, {}).setdefault(run.rate, []).append(bits)
    return {
        width: {rate: sum(values) / len(values) for rate, values in sorted(by_rate.items())}
        for width, by_rate in sorted(found.items())
    }


def best(curve: Curve) -> float:
    return min(curve, key=lambda rate: curve[rate])


def power(rate: float) -> str:
    return f"2^{math.log2(rate):.0f}"


def verdict(by_width: dict[int, Curve]) -> str:
    """Where the best learning rates are, and whether a lower or higher one might have been better still."""
    found = {width: best(curve) for width, curve in by_width.items()}
    told = ", ".join(f"{power(rate)} at {width}" for width, rate in found.items())
    edges = [width for width, rate in found.items() if rate in (min(by_width[width]), max(by_width[width]))]
    open_ = f" (at the edge of what was tried at {', '.join(map(str, edges))})" if edges else ""
    missing = [str(width) for width in WIDTHS if width not in found]
    left = f" Not run: {', '.join(missing)}." if missing else ""
    return f"{'The same' if len(set(found.values())) == 1 else 'Not the same'}: {told}{open_}.{left}"


def section(done: dict[Run, float], mixer: str) -> list[str]:
    lines = [f"## {mixer}", ""]
    for mup, name in ((True, "muP"), (False, "standard")):
        by_width = curves(done, mixer, mup)
        lines += [f"{name}. {verdict(by_width)}", "", f"| width | {' | '.join(map(power, RATES))} |"]
        lines += ["|---" * (len(RATES) + 1) + "|"]
        for width, curve in by_width.items():
            cells = [_cell(curve, rate) for rate in RATES]
            lines.append(f"| {width} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _cell(curve: Curve, rate: float) -> str:
    if rate not in curve:
        return ""
    return f"**{curve[rate]:.3f}**" if rate == best(curve) else f"{curve[rate]:.3f}"


ABOUT = f"""\
# Learning rates across widths

Written by `python -m benchmarks.mup`, on a CPU in float32. Stacks of {LAYERS} layers with gated MLPs of half the width and
embeddings times {SCALE:g}, trained by AdamW with {WARM:.0%} of warm-up and a linear fall to 0. What is shown is the loss that is
left, in bits a byte, after {STEPS["attention"]} steps of attention and {STEPS["retnet"]} of the others on {BATCHES} batches of {ROWS} x {TOKENS} bytes of Python's
standard library, read again and again: how fast a stack learns, not how well it predicts. The base is the width of
{BASE}, where both ways are one. Wider attention has more heads, a wider retnet wider ones. Best in bold.

Without muP the wide stacks, each at a best rate of its own, often end lower: muP holds the embedding's and the head's
steps where the base has them, and these few batches are learned by heart. What muP saves is the search.

One pilot was less clear: attention with 4 heads at every width and embeddings of 0.02, which layers drown. With muP it
stayed on the plateau of bigrams, at best 3.163 bits at 2^-8 (128), 3.209 at 2^-8 (256) and 3.305 at 2^-7 (512, 1.5 %
below 2^-8); without, it went to 2.675 at 2^-9 (256) and 1.700 at 2^-10 (512). muP keeps what the base has, its
mistakes too.

![learning rate against loss](mup.png)
"""  # noqa: E501


def report(done: dict[Run, float]) -> str:
    mixers = [mixer for mixer in MIXERS if any(run.mixer == mixer for run in done)]
    return "\n".join([ABOUT, *(line for mixer in mixers for line in section(done, mixer))])


def draw(done: dict[Run, float], file: Path) -> None:
    """A row a mixer: muP beside the standard parametrisation, a curve a width."""
    from matplotlib.figure import Figure

    mixers = [mixer for mixer in MIXERS if any(run.mixer == mixer for run in done)]
    figure = Figure(figsize=(9, 3 * len(mixers)), layout="constrained")
    axes = figure.subplots(len(mixers), 2, sharex=True, sharey="row", squeeze=False)
    for row, mixer in zip(axes, mixers, strict=True):
        for place, (mup, name) in zip(row, ((True, "muP"), (False, "standard")), strict=True):
            for width, curve in curves(done, mixer, mup).items():
                (line,) = place.plot(list(curve), list(curve.values()), marker="o", ms=4, label=f"width {width}")
                place.plot(best(curve), curve[best(curve)], marker="*", ms=14, color=line.get_color())
            place.set(title=f"{mixer}, {name}", ylabel="bits a byte", xlabel="learning rate")
            place.set_xscale("log", base=2)
            place.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="train nothing, write what is known")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not options.report:
        sweep(RESULTS / "mup.jsonl")
    done = found(RESULTS / "mup.jsonl")
    (RESULTS / "mup.md").write_text(report(done))
    draw(done, RESULTS / "mup.png")


if __name__ == "__main__":
    main()
