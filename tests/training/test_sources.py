"""Sources mixed by weight: exact shares, each source once an epoch of its own, an order that resumes to the bit."""

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import eulerstack as es
from eulerstack.data.order import Mixed


@pytest.mark.parametrize("weights", [(1, 1), (7, 2, 1), (0.1, 0.2, 0.7), (1, 10_000, 3), (1e-6, 1)])
def test_shares_are_exact_at_any_time(weights: tuple[float, ...]) -> None:
    parts = [Fraction(str(weight)) for weight in weights]
    shares = [part / sum(parts) for part in parts]
    order, given = Mixed([50] * len(shares), shares, 4, 0), [0] * len(shares)
    for n in range(3000):
        which, nth = order.source(n)
        assert nth == given[which]
        given[which] += 1
        assert all(abs(count - share * (n + 1)) <= 1 for count, share in zip(given, shares, strict=True))
    far = 10**15
    counts = [order.source(n) for n in range(far, far + 50)]
    assert all(abs(nth - shares[which] * far) <= 60 for which, nth in counts)


def test_each_source_goes_through_its_own_epochs() -> None:
    order = Mixed([10, 30], [Fraction(1, 2), Fraction(1, 2)], 4, 3)
    rows = list(itertools.chain(*(order.batch(at) for at in range(15))))
    assert Counter(rows) == Counter({**dict.fromkeys(range(10), 3), **dict.fromkeys(range(10, 40), 1)})
    first = [row for row in rows if row < 10]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))
    assert first[:10] != first[10:20]
    assert [*Mixed([10, 30], order.of_rest, 4, 4).batch(0)] != order.batch(0)


def test_ranks_share_mixed_batches() -> None:
    whole = Mixed([10, 30], [Fraction(1, 4), Fraction(3, 4)], 4, 3)
    both = [Mixed([10, 30], [Fraction(1, 4), Fraction(3, 4)], 4, 3, (rank, 2)) for rank in (0, 1)]
    assert [[*a, *b] for a, b in zip(*both, strict=True)] == [*whole]


def mixture(corpus: Path, **options: Any) -> es.TextData:
    sources = [
        {"path": str(corpus), "weight": 3, "pattern": "0*.txt"},
        {"path": str(corpus), "weight": 1, "pattern": "1*.txt"},
    ]
    made = es.TextData(
        sources=sources,
        **{"seq_len": 50, "batch_size": 4, "seed": 2, "cache_dir": str(corpus.parent / "cache"), **options},
    )
    made.setup()
    return made


@pytest.mark.parametrize("packing", ["cut", "packed"])
def test_rows_of_both_sources_are_read(corpus: Path, packing: str) -> None:
    made = mixture(corpus, packing=packing, held_out=0.2)
    loader = made.train_dataloader()
    first = len(made._sets("train")[0])
    for at in range(6):
        assert sum(row < first for row in loader.order.batch(at)) == 3
    held = list(made.val_dataloader())
    wanted = sum(len(one) for one in made._sets("held_out"))
    assert sum(len(batch.tokens) for batch in held) == wanted
    assert 1 < made.yardsticks["gzip -9"] < 8
    assert next(iter(loader)).bytes_per_token == pytest.approx(1.0, rel=0.05)


def test_a_mixture_resumes_to_the_bit(corpus: Path) -> None:
    loader = mixture(corpus).train_dataloader()
    all_of = [batch.tokens for _ in range(3) for batch in loader]
    for workers, stop in ((0, 5), (2, 17)):
        half, got = mixture(corpus, workers=workers).train_dataloader(), []
        while len(got) < stop:
            for batch in half:
                got.append(batch.tokens)
                if len(got) == stop:
                    break
        rest = mixture(corpus, workers=workers, seed=9).train_dataloader()
        rest.load_state_dict(half.state_dict())
        got += [batch.tokens for batch in rest]
        assert all(torch.equal(a, b) for a, b in zip(got, all_of, strict=False))
    single = es.TextData(str(corpus), seq_len=50, batch_size=4, cache_dir=str(corpus.parent / "cache"))
    single.setup()
    with pytest.raises(ValueError, match=r"the run to resume had data\.corpus = None"):
        single.train_dataloader().load_state_dict(half.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "x", "sources": [{"path": "y", "weight": 1}]}, "data.path and data.sources are both given"),
        ({"pattern": "*.txt", "sources": [{"path": "y", "weight": 1}]}, "data.pattern and data.sources are both given"),
        ({"sources": []}, r"data.sources = \[\] must be a list"),
        ({"sources": [{"path": "y"}]}, "data.sources.0 = .* must have a path and a weight"),
        ({"sources": [{"path": "y", "weight": 0}]}, "data.sources.0.weight = 0 must be a number above 0"),
        ({"sources": [{"path": "y", "weight": float("nan")}]}, "data.sources.0.weight = nan must be"),
        ({"sources": [{"path": "y", "weight": "2"}]}, "data.sources.0.weight = '2' must be"),
        ({"sources": [{"path": "y", "weight": 1, "wieght": 1}]}, "has an unknown key 'wieght'; its keys are path, w"),
        ({"sources": [{"path": "", "weight": 1}]}, "data.sources.0.path = '' must be a text"),
    ],
)
def test_what_makes_no_mixture_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        es.TextData(**options)
