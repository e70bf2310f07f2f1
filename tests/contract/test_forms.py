"""Three forms, one result: outputs, final states and gradients, for any split, from any state."""

from functools import partial
from itertools import product

import pytest
import torch

from eulerstack.segments import Segments
from eulerstack.testing import CUTS, FORMS, TOKENS, TOLERANCE, WIDTH, Contract, close

from .cases import MIXERS, contract, make

STARTS = (0, 3, 19)


def grid() -> list[object]:
    """Every mixer, dtype, split and start; quick are float64's from one start, half of the splits for each mixer."""
    cases = []
    for dtype, (i, mixer), (j, cut), start in product(TOLERANCE, enumerate(MIXERS), enumerate(CUTS), STARTS):
        exact = start == 19 and (i + j) % 2 == 0
        quick = exact if dtype == torch.float64 else cut in ("whole", "steps") and start == 3
        marks = [] if quick else [pytest.mark.slow]
        cases.append(pytest.param(mixer, dtype, cut, start, marks=marks, id=f"{mixer}-{dtype}-{cut}-{start}"))
    return cases


@pytest.mark.parametrize(("mixer", "dtype", "cut", "start"), grid())
def test_every_split_gives_the_result_of_single_steps(mixer: str, dtype: torch.dtype, cut: str, start: int) -> None:
    contract(mixer).splits(cut, start, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cut", ["whole", "chunk 5", "steps", "chunks to steps"])
def test_parallel_gives_the_result_of_the_forms_with_a_state(mixer: str, dtype: torch.dtype, cut: str) -> None:
    contract(mixer).parallel(cut, dtype)


def test_gradients_whose_terms_cancel_are_not_told_as_faults() -> None:
    """Weights for which a Hyena filter's bias has a gradient in float32 that is off by 6e-5 in either form."""
    Contract(partial(make, "hyena_deep", seed=4)).parallel("steps", torch.float32)


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_sees_the_future_and_every_token_matters(mixer: str) -> None:
    leaks = 1e-14 if MIXERS[mixer][0] == "hyena" else 0.0  # a Fourier transform rounds all of its outputs together
    contract(mixer).causal(leaks, behind=3)


@pytest.mark.parametrize(
    "promise",
    ["weights", "handed_over", "forward", "one_token", "without_grad", "refusals", "nothing", "state_bytes", "counts"],
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_promises(mixer: str, promise: str) -> None:
    getattr(contract(mixer), promise)()


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_stands_in_a_linear_layers_place_is_called(mixer: str) -> None:
    promise = contract(mixer)
    for layers in promise.linears():
        promise.adapted(layers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_hooks_on_linear_layers_always_run(mixer: str, form: str) -> None:
    contract(mixer).hooked(form)


@pytest.mark.parametrize("mixer", MIXERS)
def test_refusals_say_why(mixer: str) -> None:
    module = make(mixer, torch.float64)
    x = torch.randn(1, 2, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="one token"):
        module.recurrent(x, module.init_state(1, 4), Segments.dense(2))
    with pytest.raises(ValueError, match="positions"):
        module.chunkwise(x, module.init_state(1, 4))
    with pytest.raises(ValueError, match="chunk_size = 0"):
        module.chunkwise(x, module.init_state(1, 4), Segments.dense(2), chunk_size=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_one_segments_serves_every_form(mixer: str) -> None:
    """What the layers of a call share must not pass from one form to another."""
    module, dense = make(mixer, torch.float64), Segments.dense(1, 4)
    x, state = torch.randn(1, 1, WIDTH, dtype=torch.float64), contract(mixer).after(module, 1, 4)
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
