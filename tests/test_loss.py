"""The loss in parts is the loss of all tokens, and keeps no logits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import eulerstack as es
from eulerstack.layers import loss
from eulerstack.spec import with_hints

from .conftest import close

VOCAB, WIDTH = 50, 8


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """h [2, 9, D], targets of which some do not count, and a head's weight."""
    targets = torch.randint(0, VOCAB, (2, 9)).masked_fill(torch.rand(2, 9) < 0.3, -100)
    return torch.randn(2, 9, WIDTH, dtype=torch.float64), targets, torch.randn(VOCAB, WIDTH, dtype=torch.float64)


def both(h: Tensor, targets: Tensor, weight: Tensor) -> list[Tensor]:
    """The two losses, and the gradients of their sum by h and the weight."""
    leaves = [t.clone().requires_grad_() for t in (h, weight)]
    found = loss.next_token_loss(leaves[0], targets, lambda x: x @ leaves[1].T, VOCAB, with_z=True)
    return [*found, *torch.autograd.grad(found[0] + 0.1 * found[1], leaves)]


@pytest.mark.parametrize("rows", [1, 4, 18])
def test_parts_give_what_all_tokens_give(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn()
    wanted = both(*given)
    monkeypatch.setattr(loss, "LOGITS", rows * VOCAB)
    for got, value in zip(both(*given), wanted, strict=True):
        close(got, value, 1e-12)


def test_the_losses_are_their_definitions() -> None:
    h, targets, weight = drawn()
    logits, counted = h @ weight.T, targets != -100
    entropy, z, *_ = both(h, targets, weight)
    close(entropy, F.cross_entropy(logits[counted], targets[counted]), 1e-12)
    close(z, logits.exp().sum(-1).log()[counted].square().mean(), 1e-12)


def test_nothing_counts() -> None:
    h, targets, weight = drawn()
    entropy, z, *grads = both(h, torch.full_like(targets, -100), weight)
    assert entropy.item() == z.item() == 0
    assert all((grad == 0).all() for grad in grads)


def test_parts_keep_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, (h, targets, weight) = [], drawn()
    monkeypatch.setattr(loss, "LOGITS", 4 * VOCAB)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        loss.next_token_loss(h.requires_grad_(), targets, lambda x: x @ weight.T, VOCAB)
    assert not [shape for shape in kept if shape[-1:] == (VOCAB,) and shape != weight.shape]


def test_the_hint_adds_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = es.load("arch_expert_research_mini")
    tokens = torch.randint(0, 256, (2, 33))
    parts = []
    for weight in (0.0, 0.25, 0.5):
        torch.manual_seed(0)
        model = es.build(with_hints(spec, {"z_loss": weight}))
        total, found = model.losses(tokens[:, :-1], tokens[:, 1:])
        close(total, sum(found[name] for name in ("cross_entropy", "z") if name in found), 1e-6)
        parts.append(found)
    assert "z" not in parts[0]
    assert torch.equal(parts[1]["cross_entropy"], parts[0]["cross_entropy"])
    assert parts[2]["z"].item() == pytest.approx(2 * parts[1]["z"].item(), rel=1e-5)
