"""Three forms, one result: outputs, final states and gradients, for any split, from any state."""

import pytest
import torch

from eulerstack.segments import Segments

from ..conftest import close
from .cases import MIXERS, TOLERANCE, WIDTH, Result, drawn_state, gradients, make, run, splits

TOKENS = 27
CUTS = {name: (pieces, sizes) for name, pieces, sizes in splits(TOKENS)}
STARTS = (0, 3, 19)


def agree(got: Result, wanted: Result, tolerance: float) -> None:
    close(got.y, wanted.y, tolerance)
    for name, tensor in wanted.state.items():
        close(got.state[name], tensor, tolerance)
    scale = max(g.abs().max().item() for g in wanted.grads.values())
    for name, grad in wanted.grads.items():
        worst = (got.grads[name] - grad).abs().max().item()
        assert worst <= tolerance * max(grad.abs().max().item(), 1e-3 * scale), (name, worst)


def grid() -> list[object]:
    """Every mixer, split and start in float64; float32 and the rest of the starts are slow."""
    cases = []
    for dtype in TOLERANCE:
        for mixer in MIXERS:
            for cut in CUTS:
                for start in STARTS:
                    quick = start == 19 if dtype == torch.float64 else cut in ("whole", "steps") and start == 3
                    marks = [] if quick else [pytest.mark.slow]
                    cases.append(
                        pytest.param(mixer, dtype, cut, start, marks=marks, id=f"{mixer}-{dtype}-{cut}-{start}")
                    )
    return cases


@pytest.mark.parametrize(("mixer", "dtype", "cut", "start"), grid())
def test_every_split_gives_the_result_of_single_steps(mixer: str, dtype: torch.dtype, cut: str, start: int) -> None:
    module = make(mixer, dtype)
    state = drawn_state(module, 2, start, dtype)
    x = torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    wanted = run(module, x, state, start, [1] * TOKENS, [0])
    if cut == "steps":  # the other way round: steps against one chunk of everything
        wanted = run(module, x, state, start, [TOKENS], [TOKENS])
    agree(run(module, x, state, start, *CUTS[cut]), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cut", ["whole", "chunk 5", "steps", "chunks to steps"])
def test_parallel_gives_the_result_of_the_forms_with_a_state(mixer: str, dtype: torch.dtype, cut: str) -> None:
    module = make(mixer, dtype)
    x = torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    leaf = x.clone().requires_grad_()
    y = module.parallel(leaf)
    state = drawn_state(module, 2, 0, dtype)
    other = run_outputs(module, x, state, cut)
    close(other.y, y, TOLERANCE[dtype])
    wanted = Result(y, {}, gradients(module, [y], {"x": leaf}))
    agree(other, wanted, TOLERANCE[dtype])


def run_outputs(module, x, state, cut):  # type: ignore[no-untyped-def]
    """`run` with gradients of the outputs alone: `parallel` has no final state."""
    leaf = x.clone().requires_grad_()
    segments, outs, at = Segments.dense(x.shape[1]), [], 0
    pieces, sizes = CUTS[cut]
    for i, length in enumerate(pieces):
        size = sizes[i] if len(sizes) > 1 else sizes[0]
        part, where = leaf[:, at : at + length], segments.slice(at, at + length)
        y, state = (
            module.recurrent(part, state, where) if size == 0 else module.chunkwise(part, state, where, chunk_size=size)
        )
        outs.append(y)
        at += length
    y = torch.cat(outs, 1)
    return Result(y, {}, gradients(module, [y], {"x": leaf}))


@pytest.mark.parametrize("mixer", MIXERS)
def test_parallel_of_prefix_and_rest_is_a_state_handed_over(mixer: str) -> None:
    """A drawn initial state means the same as the tokens that drew it."""
    module = make(mixer, torch.float64)
    x = torch.randn(2, 40, WIDTH, dtype=torch.float64)
    whole = module.parallel(x)
    empty = module.init_state(2, 64, dtype=torch.float64)
    _, state = module.chunkwise(x[:, :13], empty, Segments.dense(13), chunk_size=4)
    y, _ = module.chunkwise(x[:, 13:], state, Segments.dense(27, 13), chunk_size=6)
    close(y, whole[:, 13:], 1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_forward_is_the_form_the_spec_names(mixer: str) -> None:
    module = make(mixer, torch.float64)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    close(module(x), module.parallel(x), 1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_sees_the_future_and_every_token_matters(mixer: str) -> None:
    module = make(mixer, torch.float64)
    x = torch.randn(1, 12, WIDTH, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module.parallel(x)[0, 6].sum(), x)
    reach = grad[0].abs().sum(-1)
    leaks = 1e-14 if MIXERS[mixer][0] == "hyena" else 0.0  # a Fourier transform rounds all of its outputs together
    assert (reach[7:] <= leaks * reach.max()).all()
    assert (reach[3:7] > 0).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_one_token_sequences(mixer: str) -> None:
    module = make(mixer, torch.float64)
    x = torch.randn(3, 1, WIDTH, dtype=torch.float64)
    y = module.parallel(x)
    for step in (module.recurrent, module.chunkwise):
        close(step(x, module.init_state(3, 4, dtype=torch.float64), Segments.dense(1))[0], y, 1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_grad_gives_the_same(mixer: str) -> None:
    """The buffers that are written in place under no_grad hold what the graph would."""
    module = make(mixer, torch.float64)
    x, state = torch.randn(2, 9, WIDTH, dtype=torch.float64), drawn_state(module, 2, 6, torch.float64)
    wanted = run(module, x, state, 6, [4, 1, 4], [None, 0, 3])
    segments, now, outs = Segments.dense(9, 6), state.map(torch.clone), []
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            y, now = module.chunkwise(x[:, start:stop], now, segments.slice(start, stop))
            outs.append(y)
    close(torch.cat(outs, 1), wanted.y, 1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_recurrent_refuses_more_than_one_token(mixer: str) -> None:
    module = make(mixer, torch.float64)
    x = torch.randn(1, 2, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="one token"):
        module.recurrent(x, module.init_state(1, 4), Segments.dense(2))
    with pytest.raises(ValueError, match="positions"):
        module.chunkwise(x, module.init_state(1, 4))


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_empty_call_leaves_the_state_alone(mixer: str) -> None:
    module = make(mixer, torch.float64)
    state = drawn_state(module, 2, 5, torch.float64)
    y, after = module.chunkwise(torch.zeros(2, 0, WIDTH, dtype=torch.float64), state, Segments.dense(0, 5))
    assert y.shape == (2, 0, WIDTH)
    for name, tensor in state.tensors().items():
        assert torch.equal(after.tensors()[name], tensor)
    with pytest.raises(ValueError, match="chunk_size = 0"):
        module.chunkwise(torch.zeros(2, 3, WIDTH, dtype=torch.float64), state, Segments.dense(3, 5), chunk_size=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_one_segments_serves_every_form(mixer: str) -> None:
    """What the layers of a call share must not pass from one form to another."""
    module, dense = make(mixer, torch.float64), Segments.dense(1, 4)
    x, state = torch.randn(1, 1, WIDTH, dtype=torch.float64), drawn_state(module, 1, 4, torch.float64)
    one = module.chunkwise(x, state.map(torch.clone), dense)[0]
    close(module.recurrent(x, state.map(torch.clone), dense)[0], one, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_shift_of_all_positions_changes_nothing(mixer: str, dtype: torch.dtype, tolerance: float) -> None:
    """By 100,000 tokens, where a float32 angle would be off by 1e-2."""
    module, x = make(mixer, dtype), torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    close(module.parallel(x, Segments.dense(TOKENS, 100_000)), module.parallel(x), tolerance)


def test_mixers_can_be_copied_and_pickled() -> None:
    import copy
    import pickle

    for name in MIXERS:
        module = make(name, torch.float64)
        x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))
