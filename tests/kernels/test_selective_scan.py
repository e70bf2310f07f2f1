"""The selective scan against its definition, its written-out backward, and what it promises about memory and forks."""

import multiprocessing
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from eulerstack.kernels.provider import Target
from eulerstack.kernels.select import select
from eulerstack.kernels.selective_scan import torch as reference
from eulerstack.segments import Segments

from ..conftest import PATIENCE, close

numba = pytest.importorskip("eulerstack.kernels.selective_scan.numba")

PROVIDERS = {"torch": reference, "numba": numba}
NAMES = ("x", "dt", "A", "B", "C", "state")


def drawn(batch: int, tokens: int, channels: int, numbers: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, B, C and a state."""
    shapes = [(batch, tokens, channels)] * 2 + [(channels, numbers)] + [(batch, tokens, numbers)] * 2
    x, dt, A, B, C, state = (torch.randn(s, dtype=dtype) for s in [*shapes, (batch, channels, numbers)])
    return [x, dt.exp() / 2, -A.exp(), B, C, state]


def defined(inputs: list[Tensor], segments: Segments) -> tuple[Tensor, Tensor]:
    """The recurrence, number by number of rows and tokens."""
    x, dt, A, B, C, state = inputs
    y, final = torch.zeros_like(x), state.clone()
    for b in range(x.shape[0]):
        now, running = state[b], 0
        for t in range(x.shape[1]):
            label = 0 if segments.plain else int(segments.label[b, t])
            if label < 0:
                continue
            if label != running:
                now, running = torch.zeros_like(now), label
            now = (dt[b, t, :, None] * A).exp() * now + (dt[b, t] * x[b, t])[:, None] * B[b, t]
            y[b, t] = now @ C[b, t]
        final[b] = now
    return y, final


def placements(tokens: int, device: str = "cpu") -> dict[str, Segments]:
    """Three rows of 11 tokens or more: plain, packed, padded, and all at once."""
    start = torch.zeros(3, dtype=torch.int64, device=device)
    index = torch.arange(tokens, device=device)
    real = torch.stack([index >= 2, index < tokens - 4, index < 0])
    document = torch.stack([index // 3, index // 8, index * 0])
    carries = torch.tensor([False, True, True], device=device)
    return {
        "plain": Segments.dense(tokens, start),
        "packed": Segments(document=document, carries=carries).placed(start, tokens),
        "padded": Segments(real=real).placed(start, tokens),
        "packed and padded": Segments(real, document, carries=carries).placed(start, tokens),
    }


@pytest.mark.parametrize("channels", [1, 5, numba.BLOCK + 3])
@pytest.mark.parametrize("where", placements(11))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_form_is_the_definition(provider: str, where: str, channels: int) -> None:
    kernels, segments, inputs = PROVIDERS[provider].PROVIDER.kernels, placements(11)[where], drawn(3, 11, channels, 4)
    wanted, final = defined(inputs, segments)
    for size in (1, 4, 11, 100):
        y, after = kernels.chunkwise(*inputs, segments, size)
        close(y, wanted, 1e-12)
        close(after, final, 1e-12)
    empty = [*inputs[:5], torch.zeros_like(inputs[5])]
    close(kernels.parallel(*inputs[:5], segments), defined(empty, segments)[0], 1e-12)
    state, outs = inputs[5], []
    for t in range(11):
        step = [i[:, t : t + 1] if i.shape[1] == 11 else i for i in inputs[:5]]
        y, state = kernels.recurrent(*step, state, segments.slice(t, t + 1))
        outs.append(y)
    close(torch.cat(outs, 1), wanted, 1e-12)
    close(state, final, 1e-12)


@pytest.mark.parametrize("where", ["plain", "packed and padded"])
def test_the_written_out_backward(where: str) -> None:
    segments, inputs = placements(7)[where], [t.requires_grad_() for t in drawn(3, 7, 2, 3)]
    assert torch.autograd.gradcheck(lambda *a: numba.chunkwise(*a, segments, 3), inputs)


@pytest.mark.parametrize("where", placements(11))
def test_gradients_are_the_references(where: str) -> None:
    """Over several blocks of channels and a ragged last chunk."""
    segments, inputs = placements(11)[where], [t.requires_grad_() for t in drawn(3, 11, numba.BLOCK + 7, 5)]
    weights = torch.randn(3, 11, numba.BLOCK + 7, dtype=torch.float64), torch.randn_like(inputs[5])
    found = []
    for provider in PROVIDERS.values():
        outputs = provider.chunkwise(*inputs, segments, 4)
        found.append(torch.autograd.grad(outputs, inputs, weights))
    for got, wanted in zip(*found, strict=True):
        close(got, wanted, 1e-12)


def test_float32_holds_under_strong_decays() -> None:
    """dt A = -16, where a state is forgotten within a token, beside some that last for dozens."""
    inputs = drawn(1, 4096, 20, 16)
    inputs[1] = torch.ones_like(inputs[1])
    inputs[2] = -torch.logspace(-1, 2, 16, dtype=torch.float64).repeat(20, 1)
    inputs[2][:10] = -16.0
    weights = torch.randn(1, 4096, 20, dtype=torch.float64), torch.randn_like(inputs[5])
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.float().to(dtype).requires_grad_() for t in inputs]
        outputs = numba.chunkwise(*leaves, Segments.dense(4096), 256)
        grads = torch.autograd.grad(outputs, leaves, [w.float().to(dtype) for w in weights])
        found.append([*outputs, *grads])
    for got, wanted in zip(*found, strict=True):
        close(got.double(), wanted, 1e-5)


@pytest.mark.parametrize("rate", [-16.0, -87.5, -1e4, -1e30, 0.0])
def test_extreme_decays_are_numbers(rate: float) -> None:
    inputs = drawn(1, 30, 4, 2, torch.float32)
    inputs[1], inputs[2] = torch.ones_like(inputs[1]), torch.full_like(inputs[2], rate)
    inputs = [t.requires_grad_() for t in inputs]
    y, after = numba.chunkwise(*inputs, Segments.dense(30), 8)
    wanted, final = reference.chunkwise(*inputs, Segments.dense(30), 8)
    close(y, wanted, 1e-5)
    close(after, final, 1e-5)
    for grad in torch.autograd.grad((y.sum(), after.sum()), inputs):
        assert torch.isfinite(grad).all()


def test_half_precision_inputs_are_computed_wide() -> None:
    x, dt, A, B, C, state = drawn(2, 9, 6, 3, torch.float32)
    x, B, C = (t.bfloat16().requires_grad_() for t in (x, B, C))
    y, after = numba.chunkwise(x, dt, A, B, C, state, Segments.dense(9), 4)
    assert (y.dtype, after.dtype) == (torch.float32, torch.float32)
    close(y, numba.chunkwise(x.float(), dt, A, B.float(), C.float(), state, Segments.dense(9), 4)[0], 0)
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, B, C))] == [torch.bfloat16] * 3


def test_strided_inputs_and_gradients() -> None:
    inputs = drawn(2, 9, 6, 3)
    wanted = numba.chunkwise(*inputs, Segments.dense(9), 4)[0]
    turned = [t.mT.contiguous().mT.requires_grad_() for t in inputs]
    y, after = numba.chunkwise(*turned, Segments.dense(9), 4)
    close(y, wanted, 0)
    assert all(g is not None for g in torch.autograd.grad((y.sum(), after.sum()), turned))


def test_no_tokens_leave_the_state() -> None:
    inputs = drawn(2, 0, 6, 3)
    for provider in PROVIDERS.values():
        y, after = provider.chunkwise(*inputs, Segments.dense(0), 4)
        assert y.shape == (2, 0, 6)
        assert torch.equal(after, inputs[5])


def saved_bytes(tokens: int, chunk_size: int) -> int:
    """Bytes kept for the backward besides the inputs."""
    inputs = [t.requires_grad_() for t in drawn(1, tokens, 8, 32, torch.float32)]
    known, total = {t.data_ptr() for t in inputs}, 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes if tensor.data_ptr() not in known else 0
        known.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        kept = numba.chunkwise(*inputs, Segments.dense(tokens), chunk_size)
    assert kept[0].requires_grad
    return total


def test_a_state_is_kept_for_each_chunk_and_none_for_each_token() -> None:
    state, tokens = 8 * 32 * 4, 512
    assert saved_bytes(tokens, 64) <= (8 + 2) * state
    assert saved_bytes(tokens, 128) <= (4 + 2) * state
    assert saved_bytes(tokens, tokens) <= (1 + 2) * state


def scan_of_ones(inputs: list[Tensor], queue: Any = None) -> Tensor:
    y: Tensor = numba.chunkwise(*inputs, Segments.dense(6), 4)[0]
    if queue is not None:
        queue.put(y.sum().item())
    return y


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("uses", [True, False])
def test_a_forked_process_can_use_it_or_not(uses: bool) -> None:
    """As a DataLoader's worker is forked after the model has run."""
    inputs, context = drawn(4, 6, 3 * numba.BLOCK, 2), multiprocessing.get_context("fork")
    wanted, queue = scan_of_ones(inputs).sum().item(), context.SimpleQueue()
    child = (
        context.Process(target=scan_of_ones, args=(inputs, queue)) if uses else context.Process(target=len, args=("",))
    )
    child.start()
    child.join(PATIENCE)
    alive = child.is_alive()
    child.kill()
    assert not alive and child.exitcode == 0
    assert not uses or queue.get() == wanted


def test_threads_may_call_it_at_once() -> None:
    inputs, failed = drawn(4, 6, 3 * numba.BLOCK, 2), []
    wanted = scan_of_ones(inputs)

    def call() -> None:
        failed.extend(i for i in range(50) if not torch.equal(scan_of_ones(inputs), wanted))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failed and not any(thread.is_alive() for thread in threads)


def test_it_serves_a_cpu_alone() -> None:
    assert select("selective_scan", Target()).provider == "numba"
    assert select("selective_scan", Target(device="cuda")).provider == "torch"
    inputs = [t.to("meta") for t in drawn(1, 2, 3, 4)]
    with pytest.raises(ValueError, match="CPU"):
        numba.chunkwise(*inputs, Segments.dense(2, device="meta"), 4)
