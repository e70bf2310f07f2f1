"""Token ids in, token ids out as they come: prefill by `chunkwise`, then one `recurrent` step a token."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..model import Stack
from ..segments import Segments, pack_mask
from ..state import StackState
from .sampling import Sampler, Sampling
from .speculation import AHEAD, Speculation, check_draft
from .steps import Steps
from .tape import Tape

PREFILL = 1024
"""Tokens of a prompt that are read at once: bounds the memory of a long prompt."""


def generate(
    model: Stack,
    prompts: Sequence[Sequence[int]] | Sequence[int] | Tensor,
    max_new_tokens: int = 128,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    logprobs: int | None = None,
    stop: Collection[int] = (),
    draft: Stack | None = None,
    ahead: int = AHEAD,
) -> Iterator[list[int | None]]:
    """Yield one id a row and step, for prompts of any lengths; a row that met a `stop` id yields None from then on.

    The rules are Sampling's; row i is drawn with seed + i. With `logprobs` ids are Tokens, which know how likely they
    were. A `draft`, a smaller stack of the same vocabulary, guesses `ahead` tokens that the model then reads at once:
    what comes is drawn from the same distribution, and greedy the same. A text is encoded first, by
    `tokenizer_of(model.spec.tokenizer_contract).encode(text)`. Raises ValueError, before the first token, for
    what cannot be sampled or does not fit.
    """
    rows, stops = token_rows(prompts), stop_ids(stop)
    rules = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, logprobs)
    check_prompts(model, rows, max_new_tokens)
    if draft is not None:
        check_draft(model, draft, ahead, max(map(len, rows)) + max_new_tokens)
    sampler = Sampler(len(rows), model.spec.model.vocab_size, model.embedding.weight.device)
    for i, row in enumerate(rows):
        sampler.put(i, rules if seed is None else replace(rules, seed=seed + i), row)
    if draft is not None:
        return _speculated(model, draft, rows, max_new_tokens, sampler, stops, ahead)
    return _steps(model, rows, max_new_tokens, sampler, stops)


def _steps(
    model: Stack, rows: list[list[int]], count: int, sample: Sampler, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    alive = [True] * len(rows)
    with torch.inference_mode():
        logits, state = prefill(model, rows, count)
        chosen = sample(logits, range(len(rows)))
    step = Steps(model)
    for left in reversed(range(count)):
        yield [token if live else None for token, live in zip(chosen, alive, strict=True)]
        alive = [live and token not in stop for token, live in zip(chosen, alive, strict=True)]
        if not left or not any(alive):
            return
        with torch.inference_mode():
            ids = torch.tensor(chosen, device=logits.device)
            logits, state = step(ids[:, None], state)
            chosen = sample(logits, range(len(rows)))


def _speculated(
    model: Stack, draft: Stack, rows: list[list[int]], count: int, sample: Sampler, stop: frozenset[int], ahead: int
) -> Iterator[list[int | None]]:
    """Rows run ahead of each other by what is accepted of their guesses, and wait to be told in step."""
    span = ahead + 1
    with torch.inference_mode():
        logits, state = prefill(model, rows, count, rollback=span)
        _, behind = prefill(draft, rows, count, rollback=2 * span)
        speculation = Speculation(Tape(model, state, span, keep=1), Tape(draft, behind, span, keep=2), sample)
        written = [[token] for token in sample(logits, range(len(rows)))]
    told = 0
    while True:
        left = [0 if row[-1] in stop else count - len(row) for row in written]
        if any(more and len(row) == told for more, row in zip(left, written, strict=True)):
            with torch.inference_mode():
                gained = speculation([row[-1] for row in written], [min(ahead, more - 1) for more in left])
            for row, ids in zip(written, gained, strict=True):
                row.extend(_until(ids, stop))
        elif all(len(row) <= told for row in written):
            return
        else:
            yield [row[told] if told < len(row) else None for row in written]
            told += 1


def _until(ids: list[int], stop: frozenset[int]) -> list[int]:
    """The ids up to the first that stops, itself included."""
    return ids[: next((i for i, token in enumerate(ids, start=1) if token in stop), len(ids))]


def prefill(model: Stack, rows: list[list[int]], room: int = 0, *, rollback: int = 0) -> tuple[Tensor, StackState]:
    """Read prompts of any lengths. Returns each row's last logits [B, V] and a state with room for `room` more."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    tokens = tokens.to(device)
    ragged = int(lengths.min()) < longest
    state = model.init_state(len(rows), longest + room, rollback=rollback)
    last = torch.zeros(len(rows), model.spec.model.vocab_size, device=device, dtype=model.embedding.weight.dtype)
    for start in range(0, longest, PREFILL):
        part = tokens[:, start : start + PREFILL]
        left = (lengths - start).clamp(0, part.shape[1])
        segments = Segments(real=pack_mask(left, part.shape[1])) if ragged else None
        ends, state = model.chunkwise(part, state, segments, at=(left - 1).clamp(min=0)[:, None])
        last = torch.where((left > 0)[:, None], ends[:, 0], last)
    return last, state


def token_rows(prompts: Any) -> list[list[int]]:
    """Prompts as lists of ids; one alone becomes a list of one. Raises ValueError for what holds anything else."""
    rows = _values(prompts)
    if rows and all(map(_is_id, rows)):
        rows = [rows]
    found = [_values(row) for row in rows]
    others = [value for row in found for value in row if not _is_id(value)]
    if others:
        raise _no_id(others[0])
    return [[int(token) for token in row] for row in found]


def _values(given: Any) -> list[Any]:
    """What a list, an array or a tensor holds, as Python has it."""
    plain = _plain(given)
    if isinstance(plain, str | Mapping | Set) or not isinstance(plain, Iterable):
        raise _no_id(plain)
    return [_plain(value) for value in plain]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _no_id(value: Any) -> ValueError:
    if isinstance(value, str):
        encoder = "eulerstack.tokenizer_of(model.spec.tokenizer_contract)"
        return ValueError(f"a prompt is token ids, and {value!r:.60} is text: give {encoder}.encode({value!r:.60})")
    return ValueError(
        f"a prompt is token ids, and {value!r:.60} is a {type(value).__name__}: give whole numbers, as in [1, 2] or "
        "[[1, 2], [3]], or a tensor [T] or [B, T] of them"
    )


def stop_ids(stop: Any) -> frozenset[int]:
    """Raises ValueError for what is no collection of ids."""
    plain = _plain(stop)
    ids = [plain] if isinstance(plain, str) or not isinstance(plain, Iterable) else [_plain(value) for value in plain]
    if not all(map(_is_id, ids)):
        raise ValueError(f"stop = {stop!r:.60} must be token ids, as in [10]; a tokenizer's `stops` end a text")
    return frozenset(map(int, ids))


def check_prompts(model: Stack, rows: list[list[int]], count: int) -> None:
    """Raises ValueError for prompts that the model cannot go on with for `count` tokens."""
    if not rows or not all(rows):
        raise ValueError("a prompt is empty: give at least one token in each")
    model.check_keeps_state()
    vocab = model.spec.model.vocab_size
    for row in rows:
        if not 0 <= min(row) <= max(row) < vocab:
            raise ValueError(f"a prompt holds ids from {min(row)} to {max(row)}; the model knows 0 to {vocab - 1}")
    if not _is_id(count) or count < 1:
        raise ValueError(f"max_new_tokens = {count!r:.60} must be a whole number, 1 or more")
    model.check_length(max(map(len, rows)) + count)
