"""Attention of a chunk to its past without a mask: its result, and where a mask is needed."""

import pytest
import torch

import eulerstack as es
from eulerstack.kernels.attention import Logits
from eulerstack.kernels.attention import torch as reference
from eulerstack.segments import Segments

from ..conftest import close


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("tokens", "seen"), [(1, 0), (7, 0), (1, 30), (40, 9), (33, 600)])
@pytest.mark.parametrize("shared", [1, 3])
def test_is_attention_under_a_mask(tokens: int, seen: int, shared: int, dtype: torch.dtype, tolerance: float) -> None:
    q = torch.randn(2, tokens, 2 * shared, 16, dtype=dtype)
    caches = [torch.randn(2, 700, 2, 16, dtype=dtype) for _ in range(2)]
    new = torch.randn(2, tokens, 2, 16, dtype=dtype), torch.randn(2, tokens, 2, 16, dtype=dtype)
    past = caches[0][:, :seen], caches[1][:, :seen]
    with torch.no_grad():
        found = reference.continued(q, past, new, Logits(0.3))
    visible = torch.ones(1, tokens, seen + tokens, dtype=torch.bool).tril(seen)
    k, v = (torch.cat(pair, 1) for pair in zip(past, new, strict=True))
    assert found is not None
    close(found, reference.cached(q, k, v, visible, None, Logits(0.3)), tolerance)


def test_leaves_to_a_mask_what_needs_one() -> None:
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    with torch.no_grad():
        assert reference.continued(q, (k, k), (k, k), Logits(1.0)) is not None
        assert reference.continued(q, (k, k), (k, k), Logits(1.0, softcap=5.0)) is None
        assert reference.continued(q, (k, k), (k, k), Logits(1.0, sinks=torch.zeros(2, 1))) is None
        assert reference.continued(q[:, :0], (k, k), (k[:, :0], k[:, :0]), Logits(1.0)) is None
    assert reference.continued(q, (k, k), (k, k), Logits(1.0)) is None


def test_rows_that_do_not_stand_together_are_masked() -> None:
    """The bound is not every row's length: what a row has not written yet is not its past."""
    model = es.StackBuilder(d_model=32, n_heads=2, vocab_size=256, max_seq_len=64).add("attention", repeat=2).build()
    model.double()
    tokens, lengths = torch.randint(0, 256, (2, 30)), torch.tensor([20, 12])
    with torch.no_grad():
        real = torch.arange(20)[None] < lengths[:, None]
        _, ragged = model.chunkwise(tokens[:, :20], model.init_state(2), Segments(real=real))
        logits, _ = model.chunkwise(tokens[:, 20:], ragged)
        short = torch.cat([tokens[1:, :12], tokens[1:, 20:]], 1)
        close(logits[:1], model.parallel(tokens[:1])[:, 20:], 1e-12)
        close(logits[1:], model.parallel(short)[:, 12:], 1e-12)

        _, state = model.chunkwise(tokens[:, :20], model.init_state(2))
        loose, _ = model.chunkwise(tokens[:, 12:], state.rollback(8))
        close(loose, model.parallel(tokens)[:, 12:], 1e-12)
