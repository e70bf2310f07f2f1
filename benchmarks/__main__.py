"""`make bench`: training against peers, long sequences, memory and decoding. Writes benchmarks/results/."""

import argparse
import platform
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import eulerstack as es

from .memory import peak
from .peers import MODELS, OURS, VOCAB, Model
from .timing import interleaved, matmul_rates, ratio

RESULTS = Path(__file__).parent / "results"
TOKENS, BATCH = 1024, 2

PAIRS = [
    ("attention", "llama"),
    ("retnet", "llama"),
    ("tri", "llama"),
    ("mamba1", "mambapy"),
    ("mamba2", "hf_mamba2_256"),
    ("mamba2", "hf_mamba2_64"),
    ("hybrid", "bamba_256"),
    ("hybrid", "bamba_64"),
    ("attention", "moe"),
]
SLOW = [("mamba1", "hf_mamba"), ("rwkv", "hf_rwkv")]
"""Peers that take a step a token: one round."""

ROUNDS_OF_LONG = 2
LONG = [("retnet", "attention", 8192), ("retnet", "attention", 16384)]
SCALED, SHORTEST, LONGEST = ("retnet", "mamba1", "mamba2"), 2048, 32768
WEIGHED = [("retnet", "attention"), ("mamba1", "mambapy"), ("mamba2", "hf_mamba2_256"), ("attention", "llama")]


def _step(model: Model, tokens: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.loss(tokens).backward()
        model.module.zero_grad(set_to_none=True)

    return step


def _tokens(batch: int, count: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, count + 1))


def training(rounds: int) -> tuple[list[str], dict[str, float]]:
    """Forward and backward of d 256, 4 layers, float32: each pair interleaved by itself."""
    tokens, rates = _tokens(BATCH, TOKENS), matmul_rates()
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    rows = ["| ours | against | times as fast |", "|---|---|---|"]
    for mine, peer in PAIRS + SLOW:
        models = {name: MODELS[name]() for name in (mine, peer)}
        slow = (mine, peer) in SLOW
        steps = {name: _step(model, tokens) for name, model in models.items()}
        times = interleaved(steps, 1 if slow else rounds, warmup=0 if slow else 2)
        for name in times:
            seconds.setdefault(name, []).extend(times[name])
        found = ratio(times[peer], times[mine])
        names = models[mine].name, models[peer].name
        ratios[f"{names[0].removeprefix('eulerstack ')} : {names[1]}"] = found
        rows.append(f"| {names[0]} | {names[1]} | {found:.2f} |")
    told = ", ".join(f"{rate / 1e9:.0f} GFLOP/s by {name}" for name, rate in rates.items())
    return [f"matmul rates: {told}", "", *_speeds(seconds, rates), "", *rows], ratios


def _speeds(seconds: dict[str, list[float]], rates: dict[str, float]) -> list[str]:
    lines = [f"| model | parameters | tokens/s | {' | '.join(f'of {name}' for name in rates)} |"]
    lines.append("|---|---|---|" + "---|" * len(rates))
    for name, times in seconds.items():
        model, typical = MODELS[name](), statistics.median(times)
        shares = " | ".join(_share(model, typical, rate) for rate in rates.values())
        lines.append(f"| {model.name} | {model.parameters:,} | {BATCH * TOKENS / typical:,.0f} | {shares} |")
    return lines


def _share(model: Model, seconds: float, rate: float) -> str:
    """Analytic FLOPs of a training step over what the machine's matmul could do in that time; ours only."""
    if not isinstance(model.module, es.Stack):
        return ""
    return f"{3 * BATCH * model.module.flops(TOKENS) / seconds / rate:.0%}"


def long_sequences() -> tuple[list[str], dict[str, float]]:
    """Training steps of batch 1: against the attention twin, and against themselves at a shorter length."""
    lines, ratios = ["| ours | against | tokens | times as fast |", "|---|---|---|---|"], {}
    for mine, peer, count in LONG:
        steps = {name: _step(OURS[name](), _tokens(1, count)) for name in (mine, peer)}
        times = interleaved(steps, ROUNDS_OF_LONG, warmup=1)
        ratios[f"{mine} : {peer}, T {count:,}"] = ratio(times[peer], times[mine])
        lines.append(f"| {mine} | {peer} | {count:,} | {ratio(times[peer], times[mine]):.2f} |")
    lines += ["", f"| model | time a token, T {LONGEST:,} / {SHORTEST:,} | peak memory a token |", "|---|---|---|"]
    for name in SCALED:
        model = OURS[name]()
        steps = {str(count): _step(model, _tokens(1, count)) for count in (SHORTEST, LONGEST)}
        times = interleaved(steps, ROUNDS_OF_LONG, warmup=1)
        grown = ratio(times[str(LONGEST)], times[str(SHORTEST)]) * SHORTEST / LONGEST
        memory = peak(name, LONGEST) / peak(name, SHORTEST) * SHORTEST / LONGEST
        lines.append(f"| {name} | {grown:.2f} | {memory:.2f} |")
    return lines, ratios


def memory(count: int = 2048) -> list[str]:
    """What a training step of batch 1 adds to the process, in MB."""
    lines = [f"| model | peak MB, T {count:,} | of its peer's |", "|---|---|---|"]
    for mine, peer in WEIGHED:
        ours, theirs = peak(mine, count), peak(peer, count)
        lines.append(f"| {MODELS[mine]().name} | {ours:,.0f} | {ours / theirs:.2f} |")
        lines.append(f"| {MODELS[peer]().name} | {theirs:,.0f} | |")
    return lines


def decoding(rounds: int, short: int = 100, long: int = 30_000) -> list[str]:
    """A token's time and the state's bytes after a short and a long context."""
    lines = ["| stack | context | ms a token | bytes of state |", "|---|---|---|---|"]
    ends = ["", f"| stack | time at {long:,} / at {short} | bytes at {long:,} / at {short} |", "|---|---|---|"]
    for name in ("attention", "retnet", "mamba1", "mamba2", "rwkv", "tri"):
        stack = OURS[name]().module
        assert isinstance(stack, es.Stack)
        states = {str(context): _after(stack, context) for context in (short, long)}
        steps = {key: _decode(stack, state) for key, state in states.items()}
        times = interleaved(steps, rounds, warmup=5)
        for key, state in states.items():
            ms = 1e3 * statistics.median(times[key])
            lines.append(f"| {name} | {int(key):,} | {ms:.3f} | {state.nbytes():,} |")
        bytes_ratio = states[str(long)].nbytes() / states[str(short)].nbytes()
        ends.append(f"| {name} | {ratio(times[str(long)], times[str(short)]):.3f} | {bytes_ratio:.3f} |")
    return lines + ends


def _after(stack: es.Stack, context: int) -> es.StackState:
    with torch.inference_mode():
        state = stack.init_state(1, context + 2000 if stack.grows else None)
        for part in torch.randint(0, VOCAB, (1, context)).split(500, 1):
            _, state = stack.chunkwise(part, state)
    return state


def _decode(stack: es.Stack, state: es.StackState) -> Callable[[], None]:
    held, token = [state], torch.zeros(1, 1, dtype=torch.int64)

    def step() -> None:
        with torch.inference_mode():
            _, held[0] = stack.recurrent(token, held[0])

    return step


def draw(ratios: dict[str, float], file: Path) -> None:
    """A bar for each pair: how many times as fast ours is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(ratios) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(ratios), list(ratios.values()), color=["C0" if r >= 1 else "C3" for r in ratios.values()])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel="times as fast as the peer, a training step", title="eulerstack : peer")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    figure.savefig(file, dpi=120)


def _shown(title: str, lines: list[str]) -> list[str]:
    """A section, printed as soon as it is known."""
    section = [f"## {title}", "", *lines, ""]
    print("\n".join(section), flush=True)
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds of each pair")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    chip = platform.processor() or platform.machine()
    report = ["# Benchmarks", "", f"On a CPU: {chip}, {torch.get_num_threads()} threads, torch {torch.__version__},"]
    report += ["float32. Ratios are medians over interleaved rounds; the picture beside this file shows them.", ""]
    lines, ratios = training(options.rounds)
    report += _shown(f"Training, T {TOKENS}, batch {BATCH}", lines)
    lines, more = long_sequences()
    report += _shown("Long sequences, training, batch 1", lines)
    report += _shown("Memory of a training step", memory())
    report += _shown("Decoding, batch 1", decoding(200))
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text("\n".join(report))
    draw(ratios | more, options.output.with_suffix(".png"))
    print(f"written to {options.output} and {options.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
