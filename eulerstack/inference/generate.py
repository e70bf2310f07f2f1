"""Token ids in, token ids out as they come: prefill by `chunkwise`, then one `recurrent` step a token."""

from collections.abc import Collection, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..model import Stack
from ..segments import Segments, pack_mask
from ..state import StackState

PREFILL = 512
"""Tokens of a prompt that are read at once: bounds the memory of a long prompt."""


def generate(
    model: Stack,
    prompts: Sequence[Sequence[int]] | Sequence[int] | Tensor,
    max_new_tokens: int = 128,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Yield one id a row and step, for prompts of any lengths; a row that met a `stop` id yields None from then on.

    temperature 0 is greedy. Raises ValueError, before the first token, for what cannot be sampled or does not fit.
    """
    rows = _rows(prompts)
    _check(model, rows, max_new_tokens, temperature, top_k, top_p)
    device = model.embedding.weight.device
    chance = torch.Generator(device)
    if seed is not None:
        chance.manual_seed(seed)
    else:
        chance.seed()
    return _steps(model, rows, max_new_tokens, _Sampler(temperature, top_k, top_p, chance), frozenset(stop))


class _Sampler:
    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, chance: torch.Generator) -> None:
        self.temperature, self.top_k, self.top_p, self.chance = temperature, top_k, top_p, chance

    def __call__(self, logits: Tensor) -> Tensor:
        """One id [B] a row of logits [B, V]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            best = logits.topk(self.top_k).indices
            logits = torch.full_like(logits, -torch.inf).scatter(1, best, logits.gather(1, best))
        if self.top_p is not None and self.top_p < 1:
            logits = _nucleus(logits, self.top_p)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.chance)[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest ids whose probability reaches top_p (Holtzman et al. 2020, arXiv 1904.09751)."""
    ordered, index = logits.sort(descending=True)
    share = ordered.softmax(-1)
    beyond = share.cumsum(-1) - share >= top_p
    beyond[:, 0] = False
    return logits.masked_fill(beyond.scatter(1, index, beyond), -torch.inf)


def _steps(
    model: Stack, rows: list[list[int]], count: int, sample: _Sampler, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    alive = [True] * len(rows)
    with torch.inference_mode():
        logits, state = prefill(model, rows, count)
        ids = sample(logits)
    for left in reversed(range(count)):
        chosen = ids.tolist()
        yield [token if live else None for token, live in zip(chosen, alive, strict=True)]
        alive = [live and token not in stop for token, live in zip(chosen, alive, strict=True)]
        if not left or not any(alive):
            return
        with torch.inference_mode():
            out, state = model.recurrent(ids[:, None], state)
            ids = sample(out[:, -1])


def prefill(model: Stack, rows: list[list[int]], room: int = 0) -> tuple[Tensor, StackState]:
    """Read prompts of any lengths. Returns each row's last logits [B, V] and a state with room for `room` more."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    tokens = tokens.to(device)
    ragged = int(lengths.min()) < longest
    state = model.init_state(len(rows), longest + room)
    last = torch.zeros(len(rows), model.spec.model.vocab_size, device=device, dtype=model.embedding.weight.dtype)
    for start in range(0, longest, PREFILL):
        part = tokens[:, start : start + PREFILL]
        left = (lengths - start).clamp(0, part.shape[1])
        segments = Segments(real=pack_mask(left, part.shape[1])) if ragged else None
        logits, state = model.chunkwise(part, state, segments)
        ends = logits[torch.arange(len(rows), device=device), (left - 1).clamp(min=0)]
        last = torch.where((left > 0)[:, None], ends, last)
    return last, state


def _rows(prompts: Sequence[Sequence[int]] | Sequence[int] | Tensor) -> list[list[int]]:
    data: list[Any] = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if data and all(isinstance(item, Integral) for item in data):
        data = [data]
    return [[int(token) for token in row] for row in data]


def _check(
    model: Stack, rows: list[list[int]], count: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if not rows or not all(rows):
        raise ValueError("a prompt is empty: give at least one token in each")
    model.check_keeps_state()
    vocab = model.spec.model.vocab_size
    for row in rows:
        if not 0 <= min(row) <= max(row) < vocab:
            raise ValueError(f"a prompt holds ids from {min(row)} to {max(row)}; the model knows 0 to {vocab - 1}")
    if count < 1:
        raise ValueError(f"max_new_tokens = {count} must be 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} must lie above 0 and not above 1")
    model.check_length(max(map(len, rows)) + count)
