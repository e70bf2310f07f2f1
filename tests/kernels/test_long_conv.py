"""The long convolution against its sum."""

import pytest
import torch

import eulerstack as es
from eulerstack.kernels.long_conv import torch as long_conv
from eulerstack.mixers import Hyena
from eulerstack.segments import Segments

from ..conftest import close
from .test_selective_scan import placements

T, D, HELD = 13, 3, 6


@pytest.mark.parametrize("where", placements(T))
def test_every_form_is_the_sum(where: str) -> None:
    segments = placements(T)[where]
    x, taps = torch.randn(3, T, D, dtype=torch.float64), torch.randn(40, D, dtype=torch.float64)
    label = torch.zeros(3, T, dtype=torch.int64) if segments.plain else segments.label
    wanted = torch.zeros_like(x)
    for b in range(3):
        for t in range(T):
            for s in range(t + 1):
                if label[b, s] == label[b, t] >= 0:
                    wanted[b, t] += taps[t - s] * x[b, s]
    close(long_conv.parallel(x, taps, segments), wanted, 1e-12)
    close(long_conv.chunkwise(x, taps, torch.zeros(3, T, D).double(), segments), wanted, 1e-12)


@pytest.mark.parametrize("start", [0, 1, HELD])
def test_a_history_is_the_tokens_before(start: int) -> None:
    x, taps = torch.randn(2, start + T, D, dtype=torch.float64), torch.randn(40, D, dtype=torch.float64)
    whole = long_conv.parallel(x, taps, Segments.dense(start + T))
    history = torch.full((2, start + T, D), 7.0, dtype=torch.float64)  # what lies behind the past is not read
    history[:, :start] = x[:, :start]
    y = long_conv.chunkwise(x[:, start:], taps, history, Segments.dense(T, torch.tensor([start, start])))
    close(y, whole[:, start:], 1e-12)
    history[:, start] = x[:, start]
    one = long_conv.recurrent(x[:, start : start + 1], taps, history, Segments.dense(1, start))
    close(one, whole[:, start : start + 1], 1e-12)


def test_filters_are_kept_until_a_weight_changes() -> None:
    """And are the same with gradients and without, also beyond max_seq_len."""
    mixer = es.StackBuilder(d_model=8, n_heads=2, max_seq_len=16).add("hyena").build().blocks[0].mixer
    assert isinstance(mixer, Hyena)
    filters, like = mixer.filter, torch.zeros(1)
    for length in (1, 5, 16, 40):
        with torch.no_grad():
            kept = filters(length, like)
            assert kept.data_ptr() == filters(length, like).data_ptr()
        close(kept[:length], filters(length, like), 1e-6)
    with torch.no_grad():
        filters.out_proj.weight.mul_(2)
        close(filters(40, like), 2 * kept, 1e-6)
