"""`python -m benchmarks.mixers`: small stacks of equal size, one a mixer and some hybrids, trained alike.

Writes results/mixers.md, which docs/which_mixer_when.md quotes. One thread; speed is a second of CPU time, so that a
busy machine changes it little.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch

import eulerstack as es

RESULTS = Path(__file__).parent / "results" / "mixers.md"
STACK = """
schema_version: 1
model: {{name: mixers, d_model: 64, n_heads: 4, vocab_size: 256, max_seq_len: 8192, mlp_ratio: {ratio}}}
tokenizer_contract: {{type: byte}}
embedding: {{type: learned}}
layer_templates:
  a: {{mixer: {{type: attention}}, ffn: {{type: gated_mlp}}}}
  m: {{mixer: {{type: mamba, mamba: {{d_state: 64}}}}, ffn: {{type: gated_mlp}}}}
  s: {{mixer: {{type: mamba, mamba: {{variant: mamba1}}}}, ffn: {{type: gated_mlp}}}}
  r: {{mixer: {{type: retnet}}, ffn: {{type: gated_mlp}}}}
  g: {{mixer: {{type: retnet, retnet: {{gamma: gated}}}}, ffn: {{type: gated_mlp}}}}
  l: {{mixer: {{type: linear_attention}}, ffn: {{type: gated_mlp}}}}
  k: {{mixer: {{type: rwkv}}, ffn: {{type: gated_mlp}}}}
  h: {{mixer: {{type: hyena}}, ffn: {{type: gated_mlp}}}}
layer_schedule: [{{pattern: {pattern}}}]
head: {{type: causal_lm}}
"""
STACKS = {
    "attention": "a a a a a a",
    "mamba-2": "m m m m m m",
    "mamba-1": "s s s s s s",
    "retnet": "r r r r r r",
    "retnet, gated": "g g g g g g",
    "linear attention": "l l l l l l",
    "rwkv-4": "k k k k k k",
    "hyena": "h h h h h h",
    "mamba-2 and attention, 5:1": "m m m m m a",
    "retnet and attention, 5:1": "r r r r r a",
    "m r m r m a": "m r m r m a",
}
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
PARAMETERS, TOKENS, BATCH, CONTEXT = 250_000, 128, 4, 8192


@dataclass(frozen=True)
class Run:
    """What one stack cost and reached."""

    bits: float
    tokens_per_second: float


def sized(pattern: str) -> es.StackSpec:
    """The stack with the FFN width that brings it nearest to PARAMETERS."""
    specs = (es.loads(STACK.format(pattern=pattern, ratio=eighth / 8)) for eighth in range(2, 33))
    return min(specs, key=lambda spec: abs(es.estimate(spec).parameters - PARAMETERS))


def train(spec: es.StackSpec, seed: int, steps: int) -> Run:
    """Train on Python's own sources, and measure on the held-out part."""
    L.seed_everything(seed)
    module, data = es.StackModule(spec), es.TextData(seq_len=TOKENS, batch_size=BATCH)
    trainer = L.Trainer(max_steps=steps, limit_val_batches=0, **QUIET)
    start = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - start
    (measured,) = L.Trainer(limit_val_batches=40, **QUIET).validate(module, data, verbose=False)
    return Run(measured["val_bits_per_byte"], steps * TOKENS * BATCH / seconds)


def row(name: str, seeds: int, steps: int) -> str:
    """One stack's line of the table."""
    torch.set_num_threads(1)
    spec = sized(STACKS[name])
    cost = es.estimate(spec)
    runs = [train(spec, seed, steps) for seed in range(seeds)]
    bits = ", ".join(f"{run.bits:.3f}" for run in runs)
    speed = sum(run.tokens_per_second for run in runs) / seeds
    line = f"| {name} | {cost.parameters:,} | {bits} | {speed:,.0f} | {cost.state_bytes(1, CONTEXT)['total']:,} |"
    print(line, flush=True)
    return line


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--workers", type=int, default=2)
    given = arguments.parse_args()
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        rows = list(pool.map(row, STACKS, repeat(given.seeds), repeat(given.steps)))
    RESULTS.write_text(_page(given.steps, given.seeds, rows))


def _page(steps: int, seeds: int, rows: list[str]) -> str:
    about = (
        f"d_model 64, 6 layers, float32, {steps} steps of {BATCH} x {TOKENS} bytes of Python's standard library, "
        f"lr_peak 0.003, AdamW, seeds 0 to {seeds - 1}; torch {torch.__version__}, one thread, seconds of CPU time."
    )
    head = ["| stack | parameters | bits per byte | tokens a second | state at 8k, bytes |", "|---|---|---|---|---|"]
    return "\n".join(["# Mixers at equal size", "", about, "", *head, *rows, ""])


if __name__ == "__main__":
    main()
