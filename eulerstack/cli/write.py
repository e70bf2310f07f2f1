"""generate: text in, text out as it comes."""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..checkpoint import first_line, load_checkpoint
from ..inference.generate import generate
from ..inference.sampling import Token
from ..inference.speculation import AHEAD
from ..spec import load
from ..tokens import Tokenizer, tokenizer_for, until
from .output import is_dropped


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
    if not all(stops):
        raise ValueError("--stop is empty: give the text to stop at")
    if draft is None and ahead is not None:
        raise ValueError(f"--ahead {ahead} is how far a draft guesses: give --draft DIR too")
    place = usable(device)
    model = load_checkpoint(checkpoint, place)
    if draft is not None:
        rules |= {"draft": load_checkpoint(draft, place), "ahead": ahead or AHEAD}
    tokenizer = tokenizer_for(load(checkpoint), checkpoint)
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    steps = _sentenced(generate(model, rows, max_new_tokens, stop=tokenizer.stops, **rules))
    if rules["logprobs"] is not None:
        _table(steps, tokenizer)
    elif len(rows) == 1:
        ids = (step[0] for step in steps if step[0] is not None)
        _stream(prompts[0], until(tokenizer.stream(ids, rows[0]), stops))
    else:
        _batch(
            prompts, [until(tokenizer.stream(ids, row), stops) for ids, row in zip(_columns(steps), rows, strict=True)]
        )


def _sentenced(steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
    """The same steps; one that fails ends the command with a sentence."""
    try:
        yield from steps
    except (ValueError, OSError):
        raise
    except Exception as error:  # PyTorch and the kernels raise what they like, such as a full GPU's error
        raise ValueError(
            f"the text ends here, the next step failed: {type(error).__name__}: {first_line(error)}"
        ) from error


def _columns(steps: Iterator[list[int | None]]) -> Iterator[Iterator[int]]:
    """Each row's ids, when all are there."""
    for row in zip(*steps, strict=True):
        yield (token for token in row if token is not None)


def _stream(prompt: str, pieces: Iterator[str]) -> None:
    sys.stdout.write(prompt)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            if is_dropped(sys.stdout):
                return
    finally:
        sys.stdout.write("\n")


def _batch(prompts: list[str], texts: list[Iterator[str]]) -> None:
    for row, (prompt, pieces) in enumerate(zip(prompts, texts, strict=True), start=1):
        print(f"--- {row} of {len(prompts)}\n{prompt}{''.join(pieces)}")


def _table(steps: Iterator[list[int | None]], tokenizer: Tokenizer) -> None:
    """A line a token as they come: its row, its log probability, and those of the likeliest."""
    for step in steps:
        if is_dropped(sys.stdout):
            return
        for row, token in enumerate(step):
            if isinstance(token, Token):
                best = ", ".join(f"{tokenizer.name(i)!r} {score:.3f}" for i, score in token.top.items())
                print(f"{row + 1}  {token.logprob:8.3f}  {tokenizer.name(token)!r:12} {best}", flush=True)


def usable(name: str) -> torch.device:
    """The device of that name. Raises ValueError where it is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: cannot be used here ({first}); use cpu") from None
    return device
