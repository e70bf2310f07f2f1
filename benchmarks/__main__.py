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


def training(rounds: int) -> list[str]:
    """Forward and backward of d 256, 4 layers, T 1024, batch 2, float32."""
    own, tokens = twins(), torch.randint(0, VOCAB, (BATCH, TOKENS + 1))
    models = {**own, "llama": llama(), "mamba2_64": mamba2(64), "mamba2_256": mamba2(256)}
    times = interleaved({name: lambda m=model: _step(m, tokens) for name, model in models.items()}, rounds)
    rate = matmul_rate()
    lines = ["| model | parameters | tokens/s | of the matmul rate |", "|---|---|---|---|"]
    for name, model in models.items():
        seconds = statistics.median(times[name])
        part = 3 * BATCH * model.module.flops(TOKENS) / seconds / rate if name in own else float("nan")
        share = f"{part:.0%}" if name in own else ""
        lines.append(f"| {model.name} | {model.parameters:,} | {BATCH * TOKENS / seconds:,.0f} | {share} |")
    lines += ["", "| ours | against | times as fast |", "|---|---|---|"]
    pairs = [("attention", "llama"), ("retnet", "llama"), ("tri", "llama")]
    pairs += [("mamba2", "mamba2_64"), ("mamba2", "mamba2_256"), ("tri", "mamba2_64")]
    for mine, peer in pairs:
        lines.append(f"| {models[mine].name} | {models[peer].name} | {ratio(times[peer], times[mine]):.2f} |")
    return [f"matmul rate: {rate / 1e9:.0f} GFLOP/s", "", *lines]


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
    parser.add_argument("--rounds", type=int, default=12, help="counted rounds of training")
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
