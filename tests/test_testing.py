"""check_mixer: passes what keeps the contract, and says in a sentence what does not."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from min_gru import MinGRUSpec
from min_gru.mixer import MinGRU, MinGRUState
from torch import Tensor, nn

import eulerstack as es
from eulerstack.spec import extensions
from eulerstack.testing import check_mixer

EXAMPLE = Path(__file__).parents[1] / "examples" / "min_gru"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_known", {})
    monkeypatch.setattr(extensions, "_entries", lambda path: ())


def test_the_example_keeps_the_contract() -> None:
    es.register("min_gru", MinGRUSpec)
    check_mixer(MinGRU, {"chunk_size": 8, "expand": 2})
    check_mixer("min_gru", d_model=24)


def test_the_example_is_short() -> None:
    assert sum(len(file.read_text().splitlines()) for file in EXAMPLE.rglob("*.py")) < 80


@pytest.mark.parametrize("name", ["attention", "mamba", "retnet", "hyena"])
def test_our_own_may_be_named(name: str) -> None:
    check_mixer(name, {"head_dim": 8} if name == "mamba" else None)


def test_who_is_not_known_or_badly_asked_is_told() -> None:
    with pytest.raises(ValueError, match=r"no spec names MinGRU: es\.register"):
        check_mixer(MinGRU)
    es.register("min_gru", MinGRUSpec)
    with pytest.raises(es.SpecError, match="expnd"):
        check_mixer(MinGRU, {"expnd": 2})


def decayed(mixer: MinGRU, x: Tensor, segments: Any) -> Any:
    keep, new = TERMS(mixer, x, segments)
    return (keep * 0.9, new) if segments.plain else (torch.where(keep == 1, 0.9, keep), new)


def remembers(mixer: MinGRU, x: Tensor, segments: Any) -> Any:
    z = mixer.z_proj(x).sigmoid()
    real = torch.ones(1, 1, 1) if segments.plain else (segments.label >= 0)[..., None]
    return torch.where(real.bool(), 1 - z, 1), z * mixer.v_proj(x) * real


def looks_ahead(mixer: MinGRU, x: Tensor, segments: Any = None) -> Tensor:
    y: Tensor = PARALLEL(mixer, x, segments)
    return y + x.roll(-1, 1) if x.shape[1] > 1 else y


def detached(mixer: MinGRU, x: Tensor, state: MinGRUState, segments: Any = None, *, chunk_size: Any = None) -> Any:
    return CHUNKWISE(mixer, x, state.map(Tensor.detach), segments, chunk_size=chunk_size)


def narrow(mixer: MinGRU, x: Tensor, state: MinGRUState, segments: Any = None, *, chunk_size: Any = None) -> Any:
    y, state = CHUNKWISE(mixer, x, state, segments, chunk_size=chunk_size)
    return y, state.map(lambda t: t.to(x.dtype))


def wide(mixer: MinGRU, batch: int, max_tokens: int, *more: Any, **options: Any) -> MinGRUState:
    return STATE(mixer, batch, max_tokens, *more, **options).map(lambda t: t.repeat(1, 1 + (max_tokens >> 20), 1))


def lazy(mixer: MinGRU, out_scale: float = 1.0) -> None:
    for layer in (mixer.z_proj, mixer.v_proj):
        nn.init.normal_(layer.weight)


def crashes(mixer: MinGRU, x: Tensor, state: MinGRUState, segments: Any = None) -> Any:
    raise RuntimeError("shapes do not fit")


TERMS, PARALLEL, CHUNKWISE, STATE = MinGRU._terms, MinGRU.parallel, MinGRU.chunkwise, MinGRU.init_state
FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "padding decays": ("_terms", decayed, "- In a padded or packed batch, each document gives .* Not so \\("),
    "documents leak": (
        "_terms",
        remembers,
        "- Gradients of packed documents are those of separate ones. Not so \\(parallel\\)",
    ),
    "sees the future": ("parallel", looks_ahead, "- No token sees the future.* Not so: token 6 sees token 7"),
    "no gradient": (
        "chunkwise",
        detached,
        "- However a sequence is cut .* \\(whole, 19, float64\\): gradients of hidden differ",
    ),
    "narrow state": (
        "chunkwise",
        narrow,
        "- The state of a bfloat16 mixer keeps its dtypes .*: chunkwise makes hidden torch.bfloat16 of torch.float32",
    ),
    "more bytes": ("init_state", wide, "- A state's bytes .*: grows is False, but max_tokens says otherwise"),
    "a weight is left": (
        "reset_parameters",
        lazy,
        "- `reset_parameters` draws every weight. Not so: it leaves o_proj.weight",
    ),
    "crashes": ("recurrent", crashes, "it raises RuntimeError: shapes do not fit; so do 1[0-9] of the other"),
    "flops": ("flops", lambda mixer, tokens: 2.5 * tokens, "- `flops` is a whole number .* Not so: it is 40.0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_sentences(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    es.register("min_gru", MinGRUSpec)
    method, faulty, sentence = FAULTS[fault]
    monkeypatch.setattr(MinGRU, method, faulty)
    with pytest.raises(AssertionError, match=sentence) as caught:
        check_mixer("min_gru", {"chunk_size": 8})
    assert str(caught.value).startswith("min_gru breaks the contract of a mixer:\n- ")


def test_users_load_neither_it_nor_pytest() -> None:
    code = "import sys, eulerstack as es; es.build; assert 'eulerstack.testing' not in sys.modules; "
    code += "import eulerstack.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
