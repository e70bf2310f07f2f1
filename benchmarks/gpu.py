"""`python -m benchmarks.gpu`: RetNet of 6.7B decoding beside its attention twin, and both of 1.3B training, on one GPU.

Writes results/gpu.md. Weights and states are random: what is measured is time and memory. A step of decoding is held to
what it must move, the weights once and the state (a recurrent one twice: it is written too), at the rate of a copy.
"""

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import eulerstack as es
from eulerstack.inference.steps import Steps
from eulerstack.state import StackState

RESULTS = Path(__file__).parent / "results" / "gpu.md"
RETNET, TWIN = "retnet_6p7b", "retnet_6p7b_attention"
CONTEXT, ROOM, WARM, STEPS, ROUNDS = 8192, 48, 4, 10, 3
SLACK = 3 << 30  # bytes for activations and what CUDA takes for itself
BATCHES = (1, 4, 8, 12)
TRAINED, TOKENS, PEAK = ("retnet_1p3b", "retnet_1p3b_attention"), 8192, 989e12  # bf16 FLOP/s of an H100 SXM

Step = Callable[[], object]


def seconds(step: Step, count: int) -> float:
    """Of one step, the quickest of some rounds of `count`, by the device's clock."""
    taken = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            step()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / count)
    return min(taken)


def copy_rate(size: int = 4 << 30) -> float:
    """Bytes a second that a copy reads and writes."""
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    here = torch.empty_like(there)
    here.copy_(there)
    return 2 * size / seconds(lambda: here.copy_(there), 10)


def built(
    name: str, kernels: str = "auto", dtype: torch.dtype = torch.bfloat16, settings: Iterable[str] = ()
) -> es.Stack:
    return es.build(es.load(name, settings), device="cuda", dtype=dtype, kernels=kernels)


def filled(stack: es.Stack, batch: int) -> StackState:
    """A state that has seen all but ROOM tokens of the context."""
    state = stack.init_state(batch, CONTEXT)
    for layer in state.layers:
        for tensor in layer.tensors().values():
            tensor.normal_()
    state.length.fill_(CONTEXT - ROOM)
    state.reach.fill_(CONTEXT - ROOM)
    return replace(state, bound=CONTEXT - ROOM)


@torch.inference_mode()
def step_of(stack: es.Stack, batch: int) -> float:
    """Seconds of one token more for each row."""
    state, token, steps = filled(stack, batch), torch.zeros(batch, 1, dtype=torch.int64, device="cuda"), Steps(stack)

    def step() -> None:
        nonlocal state
        _, state = steps(token, state)

    for _ in range(WARM):
        step()
    assert steps.recorded, "the step was not captured"
    return seconds(step, STEPS)


def row_bytes(stack: es.Stack) -> int:
    return es.estimate(stack.spec).state_bytes(1, CONTEXT)["total"]


def moved(stack: es.Stack, batch: int) -> int:
    """Bytes that a step must move."""
    weights = sum(p.numel() * p.element_size() for name, p in stack.named_parameters() if "embedding" not in name)
    return weights + batch * row_bytes(stack) * (1 if stack.grows else 2)


def decoding() -> Iterator[str]:
    rate = copy_rate()
    yield f"A copy moves {rate / 1e12:.2f} TB/s, counting bytes read and written."
    yield ""
    yield "| stack | batch | ms a step | tokens/s | of the bandwidth's | GiB at the peak |"
    yield "|---|---|---|---|---|---|"
    speed, slowness, memory = dict[str, float](), dict[tuple[str, int], float](), dict[str, float]()
    for name in (RETNET, TWIN):
        stack = built(name).eval()
        free, _ = torch.cuda.mem_get_info()
        largest = (free - SLACK) // row_bytes(stack)
        for batch in (*BATCHES, largest):
            torch.cuda.reset_peak_memory_stats()
            taken, peak = step_of(stack, batch), torch.cuda.max_memory_allocated()
            slowness[name, batch], memory[name] = taken, memory.get(name, 0) if batch != BATCHES[-1] else peak
            share = moved(stack, batch) / rate / taken
            cells = f"{1e3 * taken:.2f} | {batch / taken:,.0f} | {share:.2f} | {peak / 2**30:.1f}"
            yield f"| {name} | {batch} | {cells} |"
            speed[name] = batch / taken
            cleared()
        del stack
        cleared()
    yield ""
    yield f"RetNet over its twin, each at its largest batch: {speed[RETNET] / speed[TWIN]:.2f}x the tokens a second "
    yield "(the paper, on an A100: 8.4x). Its time a token at the same batch, and the paper's 15.6x:"
    yield (
        ", ".join(f"{slowness[TWIN, batch] / slowness[RETNET, batch]:.2f}x less at {batch}" for batch in BATCHES) + "."
    )
    yield f"Its weights and state at batch {BATCHES[-1]}: {memory[RETNET] / memory[TWIN]:.2f} of the twin's memory."


def training(peak: float) -> Iterator[str]:
    yield f"One row of {TOKENS} tokens a step, bf16 under autocast over fp32 weights, AdamW."
    yield ""
    yield "| stack | retention | blocks | checkpointing | ms a step | tokens/s | MFU | GiB at the peak |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, kernels in ((TRAINED[0], "torch"), (TRAINED[0], "fla"), (TRAINED[1], "auto")):
        for compiled in (False, True):
            yield _trained_row(name, kernels, compiled, peak)


def _trained_row(name: str, kernels: str, compiled: bool, peak: float) -> str:
    """The first kind of checkpointing whose step fits the device."""
    why = ""
    for checkpointing in ("none", "block"):
        torch.cuda.reset_peak_memory_stats()
        try:
            stack = built(name, kernels, torch.float32, [f"training_hints.checkpointing={checkpointing}"])
            taken = seconds(_trained(stack, compiled), 4)
        except (RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
        else:
            share = 3 * stack.flops(TOKENS, training=True) / taken / peak
            cells = f"{1e3 * taken:.0f} | {TOKENS / taken:,.0f} | {share:.1%}"
            ran = f"{name} | {kernels} | {'compiled' if compiled else 'as they are'} | {checkpointing}"
            return f"| {ran} | {cells} | {torch.cuda.max_memory_allocated() / 2**30:.1f} |"
        finally:
            stack = None
            cleared()
    return f"| {name} | {kernels} | {compiled} | {why} | | | | |"


def _trained(stack: es.Stack, compiled: bool) -> Step:
    optimizer = torch.optim.AdamW(stack.train().parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, stack.spec.model.vocab_size, (1, TOKENS + 1), device="cuda")
    for block in stack.blocks if compiled else ():
        block.compile()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = stack.losses(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def cleared() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", type=float, default=PEAK, help="dense bf16 FLOP/s of the device")
    parser.add_argument("--only", choices=("decoding", "training"), help="a section; nothing is written then")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, bfloat16."
    report = ["# On a GPU", "", about, ""]
    sections = {"decoding": decoding(), "training": training(options.peak)}
    titles = {"decoding": f"Decoding at {CONTEXT:,} tokens of context", "training": f"Training at {TOKENS:,} tokens"}
    for name in (options.only,) if options.only else sections:
        for line in (f"## {titles[name]}", "", *sections[name], ""):
            print(line, flush=True)
            report.append(line)
    if not options.only:
        RESULTS.write_text("\n".join(report))


if __name__ == "__main__":
    main()
