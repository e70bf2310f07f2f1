"""`make bench`: training against peers, decoding against the length of the context. Writes benchmarks/results/."""

import argparse
import platform
import statistics
import warnings
from pathlib import Path

import torch
from torch import Tensor

import eulerstack as es

from .peers import VOCAB, Model, llama, mamba2, twins
from .timing import interleaved, matmul_rate, ratio

RESULTS = Path(__file__).parent / "results"
TOKENS, BATCH = 1024, 2


PAIRS = [
    ("attention", "llama"),
    ("retnet", "llama"),
    ("tri", "llama"),
    ("mamba2", "mamba2_64"),
    ("mamba2", "mamba2_256"),
    ("tri", "mamba2_64"),
]


def training(rounds: int) -> list[str]:
    """Forward and backward of d 256, 4 layers, T 1024, batch 2, float32: each pair interleaved by itself."""
    tokens, rate = torch.randint(0, VOCAB, (BATCH, TOKENS + 1)), matmul_rate()
    models = {**twins(), "llama": llama(), "mamba2_64": mamba2(64), "mamba2_256": mamba2(256)}
    seconds: dict[str, float] = {}
    ratios = ["| ours | against | times as fast |", "|---|---|---|"]
    for mine, peer in PAIRS:
        steps = {name: lambda m=models[name]: _step(m, tokens) for name in (mine, peer)}
        times = interleaved(steps, rounds)
        seconds |= {name: statistics.median(times[name]) for name in (mine, peer)}
        ratios.append(f"| {models[mine].name} | {models[peer].name} | {ratio(times[peer], times[mine]):.2f} |")
    lines = ["| model | parameters | tokens/s | of the matmul rate |", "|---|---|---|---|"]
    for name, model in models.items():
        speed = BATCH * TOKENS / seconds[name]
        lines.append(f"| {model.name} | {model.parameters:,} | {speed:,.0f} | {_share(model, seconds[name], rate)} |")
    return [f"matmul rate: {rate / 1e9:.0f} GFLOP/s", "", *lines, "", *ratios]


def _share(model: Model, seconds: float, rate: float) -> str:
    """Analytic FLOPs of a training step over what the machine's matmul could do in that time; ours only."""
    if not isinstance(model.module, es.Stack):
        return ""
    return f"{3 * BATCH * model.module.flops(TOKENS) / seconds / rate:.0%}"


def _step(model: Model, tokens: Tensor) -> None:
    model.loss(tokens).backward()
    model.module.zero_grad(set_to_none=True)


def decoding(rounds: int, short: int = 100, long: int = 30_000) -> list[str]:
    """A token's time and the state's bytes after a short and a long context."""
    lines = ["| stack | context | ms a token | bytes of state |", "|---|---|---|---|"]
    ends = ["", f"| stack | time at {long:,} / at {short} | bytes at {long:,} / at {short} |", "|---|---|---|"]
    for name, model in twins().items():
        stack = model.module
        assert isinstance(stack, es.Stack)
        states = {str(context): _after(stack, context, long) for context in (short, long)}
        steps = {key: _decode(stack, state) for key, state in states.items()}
        times = interleaved(steps, rounds, warmup=5)
        for key, state in states.items():
            ms = 1e3 * statistics.median(times[key])
            lines.append(f"| {model.name} | {int(key):,} | {ms:.3f} | {state.nbytes():,} |")
        bytes_ratio = states[str(long)].nbytes() / states[str(short)].nbytes()
        ends.append(f"| {name} | {ratio(times[str(long)], times[str(short)]):.3f} | {bytes_ratio:.3f} |")
    return lines + ends


def _after(stack: es.Stack, context: int, long: int) -> es.StackState:
    with torch.inference_mode():
        state = stack.init_state(1, context + 2000 if stack.grows else None)
        for part in torch.randint(0, VOCAB, (1, context)).split(500, 1):
            _, state = stack.chunkwise(part, state)
    return state


def _decode(stack: es.Stack, state: es.StackState):  # type: ignore[no-untyped-def]
    held, token = [state], torch.zeros(1, 1, dtype=torch.int64)

    def step() -> None:
        with torch.inference_mode():
            _, held[0] = stack.recurrent(token, held[0])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds of each pair")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    report = ["# Benchmarks", "", f"On a CPU: {machine}, float32. Ratios are medians over interleaved rounds.", ""]
    report += [f"## Training, T {TOKENS}, batch {BATCH}", "", *training(options.rounds), ""]
    report += ["## Decoding, batch 1", "", *decoding(300), ""]
    print("\n".join(report))
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text("\n".join(report))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
