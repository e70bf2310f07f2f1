"""Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): a draft guesses tokens that the model reads at once.

A guess d, drawn from the draft's q, is kept with probability min(1, p(d) / q(d)), where p is the model's. The first
that is refused is drawn anew from max(0, p - q), and where none is, one more comes from p: what is written has
distribution p. Both are the distributions after the request's rules; greedy ones are one-hot.
"""

import torch
from torch import Tensor

from ..kernels.precision import wide
from ..model import Stack
from ..segments import Segments
from .sampling import Sampler
from .tape import Tape

AHEAD = 4
"""Tokens that a draft guesses at a time."""


class Speculation:
    """Rounds of guessing and judging; both tapes always stand before the last token written.

    G is the most guesses of a round; a row may have fewer, or take no part.
    """

    def __init__(self, model: Tape, draft: Tape, sample: Sampler) -> None:
        self.model, self.draft, self.sample = model, draft, sample

    def __call__(self, last: list[int], guesses: list[int]) -> list[list[int]]:
        """What each row writes after its `last` token, 1 to guesses + 1 ids; nothing where guesses is -1."""
        count = torch.tensor(guesses, device=self.sample.device)
        real = count[:, None] >= torch.arange(max(guesses) + 1, device=count.device)
        tokens = torch.zeros(real.shape, dtype=torch.int64, device=count.device)
        tokens[:, 0] = torch.tensor(last, device=count.device)
        guessed, seen = self._guess(tokens, real)
        logits = self.model.chunkwise(tokens, _placed(real))
        kept, ends = self._judge(tokens, real, guessed, self._shares(logits, seen))
        back = torch.where(real[:, 0], count - kept, 0)
        self.model.rollback(back)
        self.draft.rollback(back)
        return [
            self._told(row, [*tokens[row, 1 : n + 1].tolist(), ends[row]], logits[row]) if row in ends else []
            for row, n in enumerate(kept.tolist())
        ]

    def _guess(self, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fill tokens [B, 1 + G] with guesses; their distributions [B, 1 + G, V], zero where there is none.

        Also the tokens seen at each place, [B, 1 + G, V], where some row's rules ask for them.
        """
        dtype = wide(self.draft.model.embedding.weight.dtype)
        guessed = torch.zeros(*tokens.shape, self.sample.vocab, dtype=dtype, device=tokens.device)
        seen = None if self.sample.seen is None else self.sample.seen[:, None].repeat(1, tokens.shape[1], 1)
        for i in range(tokens.shape[1]):
            logits = self.draft.recurrent(tokens[:, i : i + 1], _placed(real[:, i : i + 1]))[:, 0]
            rows = real[:, i + 1 : i + 2].nonzero()[:, 0].tolist()
            if not rows:
                continue  # the draft takes its last guess too: it then stands where the model does
            guessed[rows, i] = self.sample.shares(logits[rows], rows, None if seen is None else seen[rows, i])
            tokens[rows, i + 1] = self.sample.draw(guessed[rows, i], rows)
            if seen is not None:
                for row, token in zip(rows, tokens[rows, i + 1].tolist(), strict=True):
                    seen[row, i + 1 :, token] = True
        return guessed, seen

    def _shares(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """The model's distributions at all places [B, 1 + G, V]."""
        batch, places = logits.shape[:2]
        rows = [row for row in range(batch) for _ in range(places)]
        shares = self.sample.shares(logits.flatten(0, 1), rows, None if seen is None else seen.flatten(0, 1))
        return shares.reshape(logits.shape)

    def _judge(self, tokens: Tensor, real: Tensor, guessed: Tensor, wanted: Tensor) -> tuple[Tensor, dict[int, int]]:
        """How many guesses of each row are kept [B], and the token behind them by row."""
        rows = real[:, 0].nonzero()[:, 0].tolist()
        chance = torch.ones(tokens[:, 1:].shape, dtype=torch.float64)
        for row, count in zip(rows, real[rows, 1:].sum(1).tolist(), strict=True):
            chance[row, :count] = torch.tensor(self.sample.chances(row, count), dtype=torch.float64)
        p, q = (shares[:, :-1].gather(2, tokens[:, 1:, None])[..., 0] for shares in (wanted, guessed))
        kept = ((chance.to(p.device) * q < p) & real[:, 1:]).cumprod(1).sum(1)
        at = torch.tensor(rows, device=kept.device), kept[rows]
        rest = (wanted[at] - guessed[at]).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, wanted[at])  # p = q to rounding
        return kept, dict(zip(rows, self.sample.draw(rest, rows).tolist(), strict=True))

    def _told(self, row: int, ids: list[int], logits: Tensor) -> list[int]:
        if self.sample.seen is not None:
            self.sample.seen[row, ids] = True
        return self.sample.told(ids, logits[: len(ids)], row)


def _placed(real: Tensor) -> Segments | None:
    return None if bool(real.all()) else Segments(real=real)


def check_draft(model: Stack, draft: Stack, ahead: int, tokens: int) -> None:
    """Raises ValueError for a draft that cannot guess for the model over `tokens` tokens."""
    if ahead < 1:
        raise ValueError(f"ahead = {ahead} must be 1 or more")
    own, other = model.spec.model.vocab_size, draft.spec.model.vocab_size
    if own != other:
        raise ValueError(f"the draft knows {other} ids and the model {own}: a draft needs the model's vocabulary")
    here, there = model.embedding.weight.device, draft.embedding.weight.device
    if here != there:
        raise ValueError(f"the draft is on {there} and the model on {here}: build or load both on one device")
    try:
        draft.check_keeps_state()
        draft.check_length(tokens)
    except ValueError as error:
        raise ValueError(f"the draft cannot follow: {error}") from None
