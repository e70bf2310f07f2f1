"""generate: text in, text out as it comes."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load_checkpoint
from ..inference.generate import generate
from ..inference.sampling import Token
from ..inference.speculation import AHEAD
from ..spec import load
from ..tokens import Tokenizer, tokenizer_of, until


def write(
    prompts: list[str],
    checkpoint: str,
    max_new_tokens: int,
    device: str,
    stops: tuple[str, ...],
    draft: str | None,
    ahead: int | None,
    **rules: Any,
) -> None:
    """One prompt streams; many are printed row by row when all are done. `rules` are Sampling's."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    if not all(stops):
        raise ValueError("--stop is empty: give the text to stop at")
    if draft is None and ahead is not None:
        raise ValueError(f"--ahead {ahead} is how far a draft guesses: give --draft DIR too")
    place = usable(device)
    model = load_checkpoint(checkpoint, place)
    if draft is not None:
        rules |= {"draft": load_checkpoint(draft, place), "ahead": ahead or AHEAD}
    tokenizer = tokenizer_of(load(checkpoint).tokenizer_contract, Path(checkpoint))
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    steps = generate(model, rows, max_new_tokens, stop=tokenizer.stops, **rules)
    if rules["logprobs"] is not None:
        _table(steps, tokenizer)
    elif len(rows) == 1:
        _stream(prompts[0], (step[0] for step in steps if step[0] is not None), tokenizer, stops)
    else:
        _batch(prompts, list(steps), tokenizer, stops)


def _stream(prompt: str, ids: Iterator[int], tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
    sys.stdout.write(prompt)
    for piece in until(tokenizer.stream(ids), stops):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _batch(prompts: list[str], steps: list[list[int | None]], tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
    for row, prompt in enumerate(prompts):
        ids = [token for step in steps if (token := step[row]) is not None]
        text = "".join(until(tokenizer.stream(iter(ids)), stops))
        print(f"--- {row + 1} of {len(prompts)}\n{prompt}{text}")


def _table(steps: Iterator[list[int | None]], tokenizer: Tokenizer) -> None:
    """A line a token as they come: its row, its log probability, and those of the likeliest."""
    for step in steps:
        for row, token in enumerate(step):
            if isinstance(token, Token):
                best = ", ".join(f"{tokenizer.decode([i])!r} {score:.3f}" for i, score in token.top.items())
                print(f"{row + 1}  {token.logprob:8.3f}  {tokenizer.decode([token])!r:12} {best}", flush=True)


def usable(name: str) -> torch.device:
    """The device of that name. Raises ValueError where it is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: cannot be used here ({first}); use cpu") from None
    return device
