"""The loss of the next token, a part of the tokens at a time: the logits of all never stand at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..kernels.precision import wide
from ..segments import IGNORED

LOGITS = 1 << 25  # of a part: 128 MiB in float32

Score = Callable[[Tensor], Tensor]
Average = Callable[[Tensor], Tensor]
"""The mean of a count over the processes that share a batch."""


def unchanged(count: Tensor) -> Tensor:
    """The average of a process that has the whole batch."""
    return count


def next_token_loss(
    h: Tensor, targets: Tensor, score: Score, vocab: int, with_z: bool = False, average: Average = unchanged
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy and, `with_z`, the mean square of log Z, both over the targets that count.

    h: [B, T, D]; targets: [B, T], -100 where none counts; score: [N, D] -> logits [N, vocab]. Both are zero where no
    target counts. Z is the softmax's divisor; its loss keeps logits from drifting (PaLM, arXiv 2204.02311). Where
    there is more than one part, each is scored again in the backward, as the layers are under checkpointing. Where
    processes share a batch, `average` makes the mean of their losses the batch's.
    """
    rows, targets = h.flatten(0, 1), targets.flatten()
    size = max(1, LOGITS // vocab)
    if rows.shape[0] <= size:
        sums = _sums(rows, targets, score, with_z)
    else:
        parts = zip(rows.split(size), targets.split(size), strict=True)
        sums = torch.stack([_again(part, wanted, score, with_z) for part, wanted in parts]).sum(0)
    count = average((targets != IGNORED).sum())
    count = count + (count == 0)
    return sums[0] / count, sums[1] / count


def _again(rows: Tensor, targets: Tensor, score: Score, with_z: bool) -> Tensor:
    """`_sums`, which keeps rows alone for the backward."""
    found: Tensor = checkpoint(_sums, rows, targets, score, with_z, use_reentrant=False, preserve_rng_state=False)
    return found


def _sums(rows: Tensor, targets: Tensor, score: Score, with_z: bool) -> Tensor:
    """[2], the sum of the losses of N rows and of their squares of log Z, at least float32."""
    logits = score(rows)
    logits = logits.to(wide(logits.dtype))
    entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    if not with_z:
        return torch.stack([entropy, torch.zeros_like(entropy)])
    return torch.stack([entropy, logits.logsumexp(-1)[targets != IGNORED].square().sum()])
