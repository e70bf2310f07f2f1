"""How tokens are drawn: each row of a batch by its own rules and from its own source of chance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.precision import wide


@dataclass(frozen=True)
class Sampling:
    """One request's rules; those left out cut nothing. Raises ValueError for values that mean nothing.

    temperature: of the softmax; 0 takes the likeliest token. top_k: among the k likeliest. top_p: among the likeliest
    that reach p together (Holtzman et al. 2020, arXiv 1904.09751). min_p: among those at least min_p times as likely
    as the likeliest (Nguyen et al. 2024, arXiv 2407.01082). repetition_penalty: logits of tokens that were there are
    divided by it where positive, else multiplied (Keskar et al. 2019, arXiv 1909.05858). seed: the same seed, the same
    tokens, whatever else is in the batch. logprobs: how many likeliest tokens are told beside each one chosen.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "be 0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "be 1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "lie above 0 and not above 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "lie between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "be above 0"),
            ("seed", self.seed is None or -(1 << 63) <= self.seed < 1 << 64, "fit 64 bits"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "be 0 or more"),
        ):
            if not right:
                raise ValueError(f"{name} = {getattr(self, name)} must {wanted}")


class Token(int):
    """An id that knows how likely it was: its log probability, and those of the likeliest ids, likeliest first."""

    logprob: float
    top: dict[int, float]

    def __new__(cls, token: int, logprob: float, top: dict[int, float]) -> "Token":
        self = super().__new__(cls, token)
        self.logprob, self.top = logprob, top
        return self


class Sampler:
    """Draws tokens for rows of a batch; `put` says by which rules a row is drawn from now on."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self.rules = [Sampling(temperature=0)] * rows
        self.vocab, self.device = vocab, device
        self.chance = [torch.Generator() for _ in range(rows)]
        self.seen: Tensor | None = None

    def put(self, row: int, rules: Sampling, prompt: Sequence[int] = ()) -> None:
        self.rules[row] = rules
        if rules.seed is None:
            self.chance[row].seed()
        else:
            self.chance[row].manual_seed(rules.seed)
        if self.seen is None and rules.repetition_penalty != 1:
            self.seen = torch.zeros(len(self.rules), self.vocab, dtype=torch.bool, device=self.device)
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, torch.as_tensor(prompt, dtype=torch.int64, device=self.device)] = True

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """An id for each of some rows, logits [len(rows), V]; Tokens where the row's rules ask for logprobs."""
        logits = logits.to(wide(logits.dtype))
        if all(self.rules[row].temperature == 0 for row in rows):
            chosen = self._penalised(logits, rows, self.seen_by(rows)).argmax(-1)
        else:
            chosen = self.draw(self.shares(logits, rows, self.seen_by(rows)), rows)
        self.note(rows, chosen)
        ids = zip(chosen[:, None].tolist(), logits[:, None], rows, strict=True)
        return [self.told(token, scores, row)[0] for token, scores, row in ids]

    def seen_by(self, rows: Sequence[int]) -> Tensor | None:
        """[len(rows), V] bool: the tokens that were there; None if no row has cared yet."""
        return None if self.seen is None else self.seen[rows]

    def note(self, rows: Sequence[int], tokens: Tensor) -> None:
        """Remember a token [len(rows)] of each row."""
        if self.seen is not None:
            self.seen[rows, tokens] = True

    def draw(self, shares: Tensor, rows: Sequence[int]) -> Tensor:
        """A token [len(rows)] of each row by shares [len(rows), V], which need not sum to one."""
        reached = shares.double().cumsum(-1)
        chance = torch.tensor([self.chances(row, 1)[0] for row in rows], dtype=torch.float64, device=self.device)
        return (reached <= chance[:, None] * reached[:, -1:]).sum(-1)

    def chances(self, row: int, count: int) -> list[float]:
        """Numbers in [0, 1) from the row's own source."""
        drawn: list[float] = torch.rand(count, dtype=torch.float64, generator=self.chance[row]).tolist()
        return drawn

    def shares(self, logits: Tensor, rows: Sequence[int], seen: Tensor | None) -> Tensor:
        """How likely the rows' rules make each token [n, V], given logits and the tokens seen, both [n, V]."""
        logits = self._penalised(logits.to(wide(logits.dtype)), rows, seen)
        rules = [self.rules[row] for row in rows]
        best = torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
        if all(rule.temperature == 0 for rule in rules):
            return best
        temperature = self._column([r.temperature or 1.0 for r in rules])
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        ordered = (ordered - ordered[:, :1]) / temperature
        beyond = torch.arange(self.vocab, device=self.device) >= self._column([r.top_k or self.vocab for r in rules])
        share = ordered.masked_fill(beyond, -torch.inf).softmax(-1)
        kept = share.cumsum(-1) - share < self._column([2.0 if r.top_p in (None, 1) else r.top_p for r in rules])
        kept &= share >= self._column([r.min_p or 0.0 for r in rules]) * share[:, :1]
        kept[:, 0] = True
        share = share * kept
        greedy = torch.tensor([rule.temperature == 0 for rule in rules], device=self.device)[:, None]
        return torch.where(greedy, best, torch.zeros_like(share).scatter(1, index, share / share.sum(-1, keepdim=True)))

    def _column(self, values: Sequence[float | None]) -> Tensor:
        """[B, 1]"""
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

    def _penalised(self, logits: Tensor, rows: Sequence[int], seen: Tensor | None) -> Tensor:
        if seen is None:
            return logits
        penalty = self._column([self.rules[row].repetition_penalty for row in rows])
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def told(self, ids: list[int], logits: Tensor, row: int) -> list[int]:
        """A row's ids; where it asks, with their log probabilities by logits [n, V], whatever the rules cut."""
        count = self.rules[row].logprobs
        if count is None:
            return ids
        scores = logits.to(wide(logits.dtype)).log_softmax(-1)
        return [told(token, one, count) for token, one in zip(ids, scores, strict=True)]


def told(token: int, scores: Tensor, count: int) -> Token:
    """A token with its log probability among scores [V], and those of the `count` likeliest."""
    best = scores.topk(min(count, scores.shape[-1]))
    return Token(token, float(scores[token]), dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
