"""The kernels against their definitions, written as the loops of the papers."""

import torch
from torch import Tensor

from eulerstack.kernels.attention import Logits
from eulerstack.kernels.attention import torch as attention
from eulerstack.kernels.conv import torch as conv
from eulerstack.kernels.norm.torch import rms_norm
from eulerstack.kernels.retention import torch as retention
from eulerstack.kernels.ssd import torch as ssd
from eulerstack.layers.ffn import swiglu
from eulerstack.layers.rope import Rope, phases, rotate
from eulerstack.mixers.retention import log_gamma
from eulerstack.segments import Segments

from ..conftest import close

B, T, H, G, K, V = 2, 21, 4, 2, 3, 5


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_retention_is_equation_six() -> None:
    q, k, v, state = drawn(B, T, H, K), drawn(B, T, H, K), drawn(B, T, H, V), drawn(B, H, K, V)
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(H)], dtype=torch.float64)
    wanted, memory = [], state.clone()
    for t in range(T):
        memory = gamma[:, None, None] * memory + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        wanted.append(torch.einsum("bhk,bhkv->bhv", q[:, t], memory))
    for size in (1, 4, 21, 100):
        y, after = retention.chunkwise(q, k, v, log_gamma("eq8", H), state, Segments.dense(T), size)
        close(y, torch.stack(wanted, 1), 1e-12)
        close(after, memory, 1e-12)


def test_retention_parallel_is_equation_five() -> None:
    q, k, v = drawn(B, T, H, K), drawn(B, T, H, K), drawn(B, T, H, V)
    wanted = torch.zeros(B, T, H, V, dtype=torch.float64)
    for h in range(H):
        for n in range(T):
            for m in range(n + 1):
                weight = (1 - 2.0 ** (-5 - h)) ** (n - m) * (q[:, n, h] * k[:, m, h]).sum(-1)
                wanted[:, n, h] += weight[:, None] * v[:, m, h]
    close(retention.parallel(q, k, v, log_gamma("eq8", H), Segments.dense(T)), wanted, 1e-12)


def test_ssd_is_the_selective_state_space() -> None:
    P, N = 3, 4
    x, dt, A = drawn(B, T, H, P), drawn(B, T, H).exp(), -drawn(H).exp()
    Bs, C, state = drawn(B, T, G, N), drawn(B, T, G, N), drawn(B, H, P, N)
    wanted, memory = [], state.clone()
    for t in range(T):
        b, c = (s[:, t].repeat_interleave(H // G, 1) for s in (Bs, C))
        fed = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b)
        memory = (dt[:, t] * A).exp()[..., None, None] * memory + fed
        wanted.append(torch.einsum("bhpn,bhn->bhp", memory, c))
    for size in (1, 4, 21, 100):
        y, after = ssd.chunkwise(x, dt, A, Bs, C, state, Segments.dense(T), size)
        close(y, torch.stack(wanted, 1), 1e-12)
        close(after, memory, 1e-12)


def test_decays_keep_float32_where_their_sum_has_run_far() -> None:
    """dt = 1, A = -16 over chunks of 256: differences of float32 sums would be off by 1e-4."""
    q, k, v = torch.randn(1, 512, 1, 8), torch.randn(1, 512, 1, 8), torch.randn(1, 512, 1, 8)
    decay = torch.full((1, 512, 1), -16.0) * torch.rand(1, 512, 1)
    state = torch.randn(1, 1, 8, 8)
    y, after = retention.chunkwise(q, k, v, decay, state, Segments.dense(512), 256)
    wanted, final = retention.chunkwise(
        q.double(), k.double(), v.double(), decay.double(), state.double(), Segments.dense(512), 16
    )
    close(y.double(), wanted, 2e-6)
    close(after.double(), final, 2e-6)


def test_gradients_of_the_written_out_backwards() -> None:
    q, k, v = (drawn(1, 9, H, 2).requires_grad_() for _ in range(3))
    decay = (-drawn(1, 9, H).exp()).requires_grad_()
    state = drawn(1, H, 2, 2).requires_grad_()
    dense = Segments.dense(9)
    assert torch.autograd.gradcheck(lambda *a: retention.chunkwise(*a, dense, 4), (q, k, v, decay, state))
    fixed = (-drawn(H).exp()).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: retention.chunkwise(*a, dense, 4), (q, k, v, fixed, state))
    x, weight, bias, kept = drawn(2, 6, 3), drawn(3, 4), drawn(3), drawn(2, 3, 3)
    inputs = [t.requires_grad_() for t in (x, weight, bias, kept)]
    assert torch.autograd.gradcheck(lambda *a: conv.convolve(*a, Segments.dense(6)), inputs)
    inputs[0] = drawn(2, 2, 3).requires_grad_()  # fewer tokens than taps
    assert torch.autograd.gradcheck(lambda *a: conv.convolve(*a, Segments.dense(2)), inputs)
    assert torch.autograd.gradcheck(swiglu, (drawn(2, 5).requires_grad_(), drawn(2, 5).requires_grad_()))
    assert torch.autograd.gradcheck(rms_norm, (drawn(2, 3, 5).requires_grad_(), drawn(5).requires_grad_()))


def test_convolution_is_pytorchs() -> None:
    x, weight, bias = drawn(2, 9, 3), drawn(3, 4), drawn(3)
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    wanted = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3).mT)
    y, kept = conv.convolve(x, weight, bias, torch.zeros(2, 3, 3, dtype=torch.float64), Segments.dense(9))
    close(y, wanted, 1e-12)
    close(kept, x[:, -3:], 0)


def test_rms_norm_is_pytorchs() -> None:
    x, weight = drawn(2, 3, 8), drawn(8)
    close(rms_norm(x, weight), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6), 1e-12)


def test_attention_of_a_query_that_sees_nothing_is_zero() -> None:
    q, k, v = drawn(1, 3, 4, 2), drawn(1, 3, 2, 2), drawn(1, 3, 2, 2)
    visible = torch.tensor([[[False, False, False], [True, False, False], [True, True, False]]])
    y = attention.cached(q, k, v, visible, None, Logits(1.0))
    assert (y[:, 0] == 0).all()
    close(y[:, 1], v[:, 0].repeat_interleave(2, 1), 1e-12)


def test_published_decays() -> None:
    assert torch.allclose(log_gamma("eq8", 3).exp(), torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]).double())
    ends = log_gamma("paper_runs", 8).exp()[[0, -1]]
    assert torch.allclose(ends, torch.tensor([1 - 1 / 32, 1 - 1 / 512]).double())


def test_phases_stay_exact_at_a_million_tokens() -> None:
    cos, sin = phases(Segments.dense(1, 1_000_000), Rope((1.0, 10000**-0.5)), torch.float32)
    angle = 1_000_000 * torch.tensor([1.0, 10000**-0.5], dtype=torch.float64)
    close(cos.flatten().double(), angle.cos(), 1e-6)
    close(sin.flatten().double(), angle.sin(), 1e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    q, k, rope = drawn(1, 1, 1, 8), drawn(1, 1, 1, 8), Rope((1.0, 0.3, 0.1, 0.03))
    scores = []
    for at in (0, 57):
        turned = [rotate(x, *phases(Segments.dense(1, p), rope, torch.float64)) for x, p in ((q, at + 5), (k, at))]
        scores.append((turned[0] * turned[1]).sum())
        close(turned[0].norm(), q.norm(), 1e-12)
    close(scores[0], scores[1], 1e-12)


def test_attention_over_no_keys_gives_nothing() -> None:
    q, k, v, seen = drawn(B, 0, H, K), drawn(B, 0, G, K), drawn(B, 0, G, V), torch.ones(1, 0, 0, dtype=torch.bool)
    for softcap in (None, 2.0):
        assert attention.cached(q, k, v, seen, None, Logits(0.5, softcap)).shape == (B, 0, H, V)
