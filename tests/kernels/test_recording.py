"""A recorded program does again what was done, on other numbers, to the bit; what it could not do again is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")
recording = pytest.importorskip("eulerstack.kernels.recording")
small = pytest.importorskip("eulerstack.kernels.small")


@pytest.fixture(autouse=True)
def inferring() -> Iterator[None]:
    with torch.inference_mode():
        yield


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "numpy's array": np.asarray,
    "a branch": lambda x: bool((x > 0).any()),
    "the number of some": lambda x: x.nonzero(),
    "those under a mask": lambda x: x[x > 0],
    "dropout": torch.nn.functional.dropout,
}


@pytest.mark.parametrize("what", LOOKS)
def test_what_another_time_might_do_otherwise_is_refused(what: str) -> None:
    with recording.Recording() as heard:
        LOOKS[what](torch.ones(2, 3))
    assert heard.refused


def spread_out(x: Tensor) -> Tensor:
    from eulerstack.kernels.compiled import spread, view

    y = torch.empty_like(x)
    spread(doubled, len(x), *view(x, y))
    return y


def doubled(begin: int, end: int, x: Any, y: Any) -> None:
    y[begin:end] = 2 * x[begin:end]


def in_16_bits() -> tuple[Tensor, Tensor]:
    places = torch.arange(60, dtype=torch.float32)
    return places.sin().bfloat16()[:40].view(20, 2), places.cos().bfloat16()[:20]


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "into its own memory": lambda x: x.clone().mul_(2).add_(x),
    "through views": lambda x: x.t().contiguous().view(2, 3)[:, 1:].sum(0),
    "many results": lambda x: torch.cat([part * 2 for part in x.split(1)]) + x.topk(2).values.sum(),
    "new memory filled": lambda x: torch.zeros(3).scatter_add(0, torch.tensor([0, 2]), x[0]),
    "memory not filled": lambda x: torch.empty(3, 2).copy_(x),
    "indexes": lambda x: x[torch.tensor([1, 0]), torch.arange(2)],
    "another dtype": lambda x: x.double().softmax(-1).float(),
    "norm": lambda x: torch.nn.functional.layer_norm(x, (2,)),
    "a product and a bias in 16 bits": lambda x: torch.nn.functional.linear(x.bfloat16()[:, None], *in_16_bits()),
    "a loop in Python's threads": spread_out,
}


@pytest.mark.parametrize("what", SUMS)
def test_a_program_does_it_again_on_other_numbers(what: str) -> None:
    x = torch.rand(3, 2)
    with recording.Recording() as heard:
        y = SUMS[what](x)
    assert not heard.refused
    program = heard.program()
    for _ in range(2):
        x.copy_(torch.rand(3, 2))
        program()
        assert torch.equal(y, SUMS[what](x))


PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "add into": lambda a, b: a.add_(b),
    "add some": lambda a, b: torch.add(a, b, alpha=2),
    "subtract": lambda a, b: a - b,
    "subtract into": lambda a, b: a.sub_(b),
    "multiply": lambda a, b: a * b,
    "multiply into": lambda a, b: a.mul_(b),
    "by a number": lambda a, b: (a * 3 - 2) + 1,
    "from a number": lambda a, b: 1 - a,
    "the larger": torch.maximum,
    "the rest": lambda a, b: a.remainder(7) if a.dtype == torch.int64 else a.neg(),
    "the negative": lambda a, b: -a,
    "copied": lambda a, b: a.clone(memory_format=torch.contiguous_format) + b.contiguous(),
    "cast": lambda a, b: a.double() + b.to(torch.float64),
    "rounded": lambda a, b: a.double().mul(1 / 3).float(),
    "written into": lambda a, b: torch.empty_like(a).copy_(b.expand(a.shape)),
    "joined": lambda a, b: torch.cat([a, b.expand(a.shape), a[:0]], 0),
    "joined inside": lambda a, b: torch.cat([a, b.expand(a.shape)], -1),
}


@pytest.mark.parametrize("what", PAIRS)
@settings(max_examples=25)
@given(data=st.data())
def test_small_operations_are_pytorchs_to_the_bit(what: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5), "shape")
    order = data.draw(st.permutations(range(len(shape))), "order")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64]), "dtype")
    step = data.draw(st.integers(1, 3), "step")

    def drawn(like: Tensor) -> Tensor:
        numbers = 100 * torch.randn(like.shape, dtype=torch.float64)
        numbers[torch.rand(like.shape) < 0.1] = 0 if dtype == torch.int64 else -torch.inf
        return numbers.to(dtype)

    a = torch.empty([step * size for size in shape], dtype=dtype)[tuple(slice(None, None, step) for _ in shape)]
    a = a.permute(order)
    b = torch.empty([size if data.draw(st.booleans()) else 1 for size in a.shape], dtype=dtype)
    a.copy_(drawn(a)), b.copy_(drawn(b))
    with recording.Recording() as heard:
        y = PAIRS[what](a, b)
    program = heard.program()
    for _ in range(2):
        a.copy_(drawn(a)), b.copy_(drawn(b))
        before = a.clone()
        program()
        got = y.clone()
        assert torch.equal(got.nan_to_num(nan=5e5), PAIRS[what](a.copy_(before), b).nan_to_num(nan=5e5))


def test_what_writes_in_rows_does_so_or_says_that_there_is_no_such_place() -> None:
    caches, rows = torch.zeros(3, 8, 2, 4), torch.arange(3)[:, None]
    slots, values = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1, 2, 4)
    with recording.Recording() as heard:
        caches[rows, slots] = values
    program = heard.program()
    assert any(isinstance(entry, small.Loop) for entry in heard.entries)
    for places in ([1, 7, 3], [0, -1, -8]):
        slots.copy_(torch.tensor(places)[:, None])
        wanted = caches.clone()
        wanted[rows, slots] = values.copy_(torch.rand(3, 1, 2, 4))
        program()
        assert torch.equal(caches, wanted)
    slots[1] = 8
    with pytest.raises(IndexError, match="no place"):
        program()


def test_a_program_runs_on_no_more_threads_than_there_are_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the child of a fork that was left one thread, as a DataLoader's workers are, it waited for others forever."""
    from eulerstack.kernels.linear import numba

    before, asked = torch.get_num_threads(), list[int]()
    monkeypatch.setattr(recording, "openmp", lambda: lambda function, pointers, threads, flags: asked.append(threads))
    try:
        torch.set_num_threads(2)
        with recording.Recording() as heard:
            numba.linear(torch.rand(1, 512), [torch.rand(512, 512)], [None])
        program = heard.program()
        for threads in (2, 1):
            torch.set_num_threads(threads)
            program()
    finally:
        torch.set_num_threads(before)
    assert asked == [2, 1]
