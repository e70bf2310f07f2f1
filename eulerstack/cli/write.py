"""generate: text in, text out as it comes."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoint import load_checkpoint
from ..inference.generate import generate
from ..spec import load
from ..tokens import Tokenizer, tokenizer_of


def write(
    prompts: list[str],
    checkpoint: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    device: str,
) -> None:
    """One prompt streams; many are printed row by row when all are done."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    model = load_checkpoint(checkpoint, _device(device))
    tokenizer = tokenizer_of(load(checkpoint).tokenizer_contract, Path(checkpoint))
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    steps = generate(
        model, rows, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tokenizer.stops
    )
    if len(rows) == 1:
        _stream(prompts[0], (step[0] for step in steps if step[0] is not None), tokenizer)
    else:
        _batch(prompts, list(steps), tokenizer)


def _stream(prompt: str, ids: Iterator[int], tokenizer: Tokenizer) -> None:
    sys.stdout.write(prompt)
    for piece in tokenizer.stream(ids):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _batch(prompts: list[str], steps: list[list[int | None]], tokenizer: Tokenizer) -> None:
    for row, prompt in enumerate(prompts):
        ids = [step[row] for step in steps]
        text = tokenizer.decode([token for token in ids if token is not None])
        print(f"--- {row + 1} of {len(prompts)}\n{prompt}{text}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: cannot be used here ({first}); use cpu") from None
    return device
