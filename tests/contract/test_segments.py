"""Padding and packed documents: every document gives what it gives alone."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eulerstack.segments import Segments
from eulerstack.testing import FROM_NOTHING, ROWS, WAYS, Row

from .cases import MIXERS, contract


def grid() -> list[object]:
    """Every mixer, kind of rows and way to cut them; a third of them is quick."""
    cases = product(enumerate(MIXERS), enumerate(ROWS), enumerate(WAYS))
    return [
        pytest.param(mixer, rows, way, marks=[] if (i + j + k) % 3 == 0 else [pytest.mark.slow])
        for (i, mixer), (j, rows), (k, way) in cases
    ]


@pytest.mark.parametrize(("mixer", "rows", "way"), grid())
def test_each_document_is_as_if_alone(mixer: str, rows: str, way: str) -> None:
    contract(mixer).documents(rows, way, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_each_document_is_as_if_alone_in_float32(mixer: str, rows: str, way: str) -> None:
    contract(mixer).documents(rows, way, torch.float32)


@pytest.mark.parametrize("rows", FROM_NOTHING)
@pytest.mark.parametrize("mixer", MIXERS)
def test_parallel_and_forward_keep_documents_apart(mixer: str, rows: str) -> None:
    contract(mixer).whole_documents(rows)


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_of_packed_documents_are_those_of_separate_ones(mixer: str, form: str) -> None:
    contract(mixer).packed_gradients(form)


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_gets_no_gradient_and_gives_none(mixer: str) -> None:
    contract(mixer).padding()


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
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(case=batches())
def test_any_batch_in_any_pieces(mixer: str, case: tuple[list[Row], list[int], list[int | None]]) -> None:
    contract(mixer).batch(*case, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(case=batches())
def test_any_batch_in_any_pieces_at_length(mixer: str, case: tuple[list[Row], list[int], list[int | None]]) -> None:
    contract(mixer).batch(*case, torch.float64)


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
