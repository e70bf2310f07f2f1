"""Padding and packed documents: every document gives what it gives alone."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eulerstack.mixers import Mixer
from eulerstack.segments import Segments
from eulerstack.state import LayerState

from ..conftest import close
from .cases import MIXERS, ROOM, TOLERANCE, WIDTH, drawn_state, gradients, make, run, seen


@dataclass
class Row:
    """A row of a batch: padding on the left, documents, padding on the right; its state has seen `start` tokens."""

    left: int
    documents: list[int]
    right: int
    carries: bool
    start: int

    @property
    def length(self) -> int:
        return self.left + sum(self.documents) + self.right


def batch_of(rows: list[Row]) -> tuple[Segments, Tensor]:
    """Unplaced segments of rows of one length, and how many tokens each row's state has seen."""
    real = torch.zeros(len(rows), rows[0].length, dtype=torch.bool)
    document = torch.full(real.shape, 99)
    for i, row in enumerate(rows):
        at = row.left
        for number, length in enumerate(row.documents):
            real[i, at : at + length] = True
            document[i, at : at + length] = 5 - number
            at += length
    carries = torch.tensor([row.carries for row in rows])
    return Segments(real, document, carries=carries), torch.tensor([row.start for row in rows])


def opening(mixer: Mixer[Any], rows: list[Row], dtype: torch.dtype) -> LayerState:
    """One state whose rows have seen different numbers of tokens."""
    states = [drawn_state(mixer, 1, row.start, dtype) for row in rows]
    rows_of = iter(list(zip(*(state.tensors().values() for state in states), strict=True)))
    return states[0].map(lambda first: torch.cat(next(rows_of)))


def alone(mixer: Mixer[Any], x: Tensor, row: Row, state: LayerState) -> tuple[Tensor, dict[str, Tensor], int]:
    """The row's outputs with each document run by itself in single steps, its final state and that state's length."""
    y, at, length = torch.zeros_like(x), row.left, row.start
    final = seen(state, row.start)
    for number, count in enumerate(row.documents):
        fresh = number > 0 or not row.carries
        length = count if fresh else row.start + count
        begin = mixer.init_state(1, ROOM, dtype=x.dtype) if fresh else state
        result = run(mixer, x[:, at : at + count], begin, length - count, [1] * count, [0])
        y[:, at : at + count], final = result.y.detach(), result.state
        at += count
    return y, final, length


def check(mixer: Mixer[Any], rows: list[Row], pieces: list[int], sizes: list[int | None], dtype: torch.dtype) -> None:
    x, state = torch.randn(len(rows), rows[0].length, WIDTH, dtype=dtype), opening(mixer, rows, dtype)
    segments, start = batch_of(rows)
    placed = segments.placed(start, x.shape[1], bound=int(start.max()))
    y, after = in_pieces(mixer, x, state.map(torch.clone), placed, pieces, sizes)
    lengths = placed.ends(start)
    for i, row in enumerate(rows):
        one = state.map(lambda t, i=i: t[i : i + 1])
        wanted, final, length = alone(mixer, x[i : i + 1], row, one)
        close(y[i : i + 1], wanted, TOLERANCE[dtype])
        assert int(lengths[i]) == length
        got = seen(after.map(lambda t, i=i: t[i : i + 1]), length)
        for name, tensor in final.items():
            close(got[name], tensor, TOLERANCE[dtype])


def in_pieces(
    mixer: Mixer[Any], x: Tensor, state: LayerState, placed: Segments, pieces: list[int], sizes: list[int | None]
) -> tuple[Tensor, LayerState]:
    outs, at = [], 0
    for length, size in zip(pieces, sizes, strict=True):
        part, where = x[:, at : at + length], placed.slice(at, at + length)
        if size == 0:
            y, state = mixer.recurrent(part, state, where)
        else:
            y, state = mixer.chunkwise(part, state, where, chunk_size=size)
        outs.append(y)
        at += length
    return torch.cat(outs, 1), state


ROWS = {
    "right padding": [Row(0, [9], 6, True, 0), Row(0, [15], 0, True, 4), Row(0, [1], 14, True, 11)],
    "left padding": [Row(6, [9], 0, True, 0), Row(0, [15], 0, True, 4), Row(14, [1], 0, True, 11)],
    "both sides": [Row(2, [9], 4, True, 3), Row(5, [10], 0, True, 0), Row(0, [2], 13, False, 8)],
    "packed": [Row(0, [4, 6, 5], 0, True, 0), Row(0, [1, 1, 13], 0, True, 9), Row(0, [14, 1], 0, True, 2)],
    "packed, nothing carried": [Row(0, [4, 6, 5], 0, False, 7), Row(0, [15], 0, False, 9)],
    "packed and padded": [Row(3, [5, 4], 3, True, 5), Row(0, [2, 3, 4], 6, False, 5), Row(7, [3, 5], 0, True, 0)],
    "a row of padding": [Row(15, [], 0, True, 6), Row(0, [10], 5, True, 6), Row(15, [], 0, False, 3)],
}
WAYS: dict[str, tuple[list[int], list[int | None]]] = {
    "whole": ([15], [None]),
    "chunk 4": ([15], [4]),
    "steps": ([1] * 15, [0] * 15),
    "ragged": ([2, 1, 7, 5], [None, 0, 3, None]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_each_document_is_as_if_alone(mixer: str, rows: str, way: str) -> None:
    check(make(mixer, torch.float64), ROWS[rows], *WAYS[way], torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_each_document_is_as_if_alone_in_float32(mixer: str, rows: str, way: str) -> None:
    check(make(mixer, torch.float32), ROWS[rows], *WAYS[way], torch.float32)


@pytest.mark.parametrize("rows", ["right padding", "left padding", "packed", "packed and padded"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_parallel_and_forward_keep_documents_apart(mixer: str, rows: str) -> None:
    module = make(mixer, torch.float64)
    fresh = [Row(r.left, r.documents, r.right, True, 0) for r in ROWS[rows]]
    x, (segments, start) = torch.randn(len(fresh), 15, WIDTH, dtype=torch.float64), batch_of(fresh)
    empty = module.init_state(1, ROOM, dtype=torch.float64)
    for form in (module.parallel, module.forward):
        y = form(x, segments.placed(start, 15))
        for i, row in enumerate(fresh):
            close(y[i : i + 1], alone(module, x[i : i + 1], row, empty)[0], 1e-12)


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_of_packed_documents_are_those_of_separate_ones(mixer: str, form: str) -> None:
    module = make(mixer, torch.float64)
    x = torch.randn(1, 12, WIDTH, dtype=torch.float64, requires_grad=True)
    document = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4])
    placed = Segments(document=document).placed(torch.zeros(1, dtype=torch.int64), 12)
    if form == "parallel":
        packed = module.parallel(x, placed)
    else:
        packed = module.chunkwise(x, module.init_state(1, 12, dtype=torch.float64), placed, chunk_size=4)[0]
    separate = torch.cat([module.parallel(part) for part in x.split([5, 3, 4], 1)], 1)
    close(packed, separate, 1e-12)
    got, wanted = gradients(module, [packed], {"x": x}), gradients(module, [separate], {"x": x})
    scale = max(g.abs().max() for g in wanted.values())
    for name, grad in wanted.items():
        assert (got[name] - grad).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_gets_no_gradient_and_gives_none(mixer: str) -> None:
    module = make(mixer, torch.float64)
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    x[0, 5:] = 1e6  # what stands in the padding must not matter
    x.requires_grad_()
    real = torch.tensor([[True] * 5 + [False] * 3, [False] * 2 + [True] * 6])
    y = module.parallel(x, Segments(real=real).placed(torch.zeros(2, dtype=torch.int64), 8))
    assert (y[~real] == 0).all()
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.isfinite(grad).all()
    assert (grad[~real] == 0).all()


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Row], list[int], list[int | None]]:
    tokens = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        left = draw(st.integers(0, tokens))
        right = draw(st.integers(0, tokens - left))
        rest, documents = tokens - left - right, []
        while rest:
            documents.append(draw(st.integers(1, rest)))
            rest -= documents[-1]
        rows.append(Row(left, documents, right, draw(st.booleans()), draw(st.integers(0, 12))))
    pieces: list[int] = []
    while sum(pieces) < tokens:
        pieces.append(draw(st.integers(1, tokens - sum(pieces))))
    sizes = [
        draw(st.sampled_from([0, None, 1])) if p == 1 else draw(st.sampled_from([None, 1, 2, 5, 64])) for p in pieces
    ]
    return rows, pieces, sizes


@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=batches())
def test_any_batch_in_any_pieces(mixer: str, case: tuple[list[Row], list[int], list[int | None]]) -> None:
    check(make(mixer, torch.float64), *case, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=batches())
def test_any_batch_in_any_pieces_at_length(mixer: str, case: tuple[list[Row], list[int], list[int | None]]) -> None:
    check(make(mixer, torch.float64), *case, torch.float64)


def test_holes_and_wrong_shapes_are_refused() -> None:
    start = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="hole"):
        Segments(real=torch.tensor([[True, False, True]])).placed(start, 3)
    with pytest.raises(ValueError, match="shape"):
        Segments(document=torch.zeros(2, 3)).placed(start, 3)
    with pytest.raises(ValueError, match="bool"):
        Segments(real=torch.ones(1, 3)).placed(start, 3)
    with pytest.raises(ValueError, match="position"):
        Segments(position=torch.zeros(1, 3)).placed(start, 3)
