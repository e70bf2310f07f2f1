"""Adapters of CUDA libraries: the real ones on a GPU; elsewhere stand-ins that compute what those document, and no more.

A stand-in takes only what the library's kernel takes (layouts, dtypes, no initial state where it has none), so that
an adapter that asks for something else fails here as it would there.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eulerstack.kernels.attention import Logits
from eulerstack.kernels.attention import torch as attention
from eulerstack.kernels.conv import torch as conv
from eulerstack.kernels.provider import Target
from eulerstack.kernels.select import PROVIDERS, select, survey
from eulerstack.kernels.selective_scan import torch as scan
from eulerstack.kernels.ssd import torch as ssd

from ..conftest import close, rms_ratio
from .test_selective_scan import placements

T = 23
ADAPTERS = ["ssd.mamba_ssm", "selective_scan.mamba_ssm", "conv.causal_conv1d", "attention.flash_attn"]


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, *,
    initial_states: Tensor, seq_idx: Tensor | None, return_final_states: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token by token; the state belongs to the sequence of the token before, and the initial one to sequence 0."""
    assert x.dtype == B.dtype == C.dtype and dt.dtype == A.dtype == torch.float32
    assert all(t.is_contiguous() for t in (x, dt, B, C, initial_states)) and chunk_size in (16, 32, 64, 128, 256)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and int(seq_idx.min()) >= 0)
    assert return_final_states
    seq_idx = torch.zeros(x.shape[:2], dtype=torch.int32) if seq_idx is None else seq_idx
    state, before, ys = initial_states.float(), torch.zeros_like(seq_idx[:, 0]), []
    B, C = (t.float().repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    for t in range(x.shape[1]):
        kept = (dt[:, t] * A).exp() * (seq_idx[:, t] == before)[:, None]
        state = kept[..., None, None] * state + (dt[:, t, :, None] * x[:, t].float())[..., None] * B[:, t, :, None]
        ys.append((state @ C[:, t, :, :, None])[..., 0])
        before = seq_idx[:, t]
    return torch.stack(ys, 1).to(x.dtype), state


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, dt_bias: Tensor
) -> Tensor:
    """One step, written into the state; with heads, or (Mamba-1) without. The library's fails where dt_bias is None.

    Where A, dt and the bias are one number a head, they must be so in memory, for the library to see it.
    """
    assert not torch.is_grad_enabled(), "has no gradient"
    assert dt_bias.shape == state.shape[1:-1] and dt_bias.dtype == dt.dtype
    assert state.dim() == 3 or A.stride()[-2:] == (0, 0) == (dt.stride(-1), dt_bias.stride(-1))
    dt = dt + dt_bias
    if state.dim() == 4:
        B, C = (t.repeat_interleave(state.shape[1] // t.shape[1], 1) for t in (B, C))
        assert A.shape == state.shape[1:] and dt.shape == x.shape == state.shape[:3]
    more = (dt * x.float())[..., None] * B.float()[..., None, :]
    state.copy_((dt[..., None] * A).exp() * state + more)
    return (state @ C.float()[..., None])[..., 0].to(x.dtype)


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """From an empty state, without documents, channels before tokens."""
    assert u.dtype == delta.dtype == A.dtype == B.dtype == C.dtype == torch.float32
    assert all(t.stride(-1) == 1 for t in (u, delta, B, C)) and u.shape == delta.shape
    state, ys = torch.zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state = (delta[:, :, t, None] * A).exp() * state + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        ys.append((state @ C[:, :, t, None])[..., 0])
    return torch.stack(ys, 2)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, *, activation: str) -> Tensor:
    """Channels last in memory, which seq_idx asks for; inputs of another sequence are not seen."""
    assert x.stride(1) == 1 and x.shape[1] % 8 == 0 and 2 <= weight.shape[1] <= 4 and activation == "silu"
    assert x.dtype == weight.dtype == bias.dtype
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    seq_idx = torch.zeros_like(x[:, 0], dtype=torch.int32) if seq_idx is None else seq_idx
    y = torch.zeros_like(x) + bias[:, None]
    for lag in range(weight.shape[1]):
        same = F.pad(seq_idx, (lag, 0), value=-9)[:, : x.shape[2]] == seq_idx
        y = y + F.pad(x, (lag, 0))[:, :, : x.shape[2]] * same[:, None] * weight[:, -1 - lag, None]
    return F.silu(y)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int,
    dropout_p: float, *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """Sequence by sequence; a window (left, 0) sees `left` tokens before a query, -1 all of them."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype and causal
    assert cu_q.dtype == cu_k.dtype == torch.int32 and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert dropout_p == 0
    assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
    outs = []
    for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        assert b - a <= longest_q
        queries, keys, values = (t[a:b].float().transpose(0, 1) for t in (q, k, v))
        keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], 0) for t in (keys, values))
        scores = queries @ keys.mT * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        back = torch.arange(b - a)[:, None] - torch.arange(b - a)
        scores = scores if alibi_slopes is None else scores - alibi_slopes[:, None, None] * back
        seen = (back >= 0) & (back <= (window_size[0] if window_size[0] >= 0 else b))
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs).to(q.dtype)


LIBRARIES: dict[str, list[Callable[..., Any]]] = {
    "selective_scan_cuda": [],
    "mamba_ssm": [],
    "mamba_ssm.ops": [],
    "mamba_ssm.ops.triton": [],
    "mamba_ssm.ops.triton.ssd_combined": [mamba_chunk_scan_combined],
    "mamba_ssm.ops.triton.selective_state_update": [selective_state_update],
    "mamba_ssm.ops.selective_scan_interface": [selective_scan_fn],
    "causal_conv1d": [causal_conv1d_fn],
    "flash_attn": [flash_attn_varlen_func],
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The stand-ins in place of the libraries, or the libraries themselves on a GPU."""
    if request.param == "real" and DEVICE == "cpu":
        pytest.skip("needs a GPU")
    if request.param == "stand-in":
        for name, functions in LIBRARIES.items():
            module = types.ModuleType(name)
            vars(module).update({f.__name__: f for f in functions})
            monkeypatch.setitem(sys.modules, name, module)
    for adapter in ADAPTERS:
        monkeypatch.delitem(sys.modules, f"eulerstack.kernels.{adapter}", raising=False)
    yield request.param
    for adapter in ADAPTERS:
        sys.modules.pop(f"eulerstack.kernels.{adapter}", None)


def kernels(operation: str, provider: str, library: str) -> Any:
    if library == "real":
        pytest.importorskip(provider)
    return importlib.import_module(f"eulerstack.kernels.{operation}.{provider}")


def device(library: str) -> str:
    return DEVICE if library == "real" else "cpu"


def compare(fast: Callable[..., Any], slow: Callable[..., Any], inputs: list[Tensor], bound: float, *rest: Any) -> None:
    """Outputs and gradients of both, the reference in float64, of outputs weighed by the same numbers.

    They are numbers of the inputs' dtype: rounded on the way back in one of both, they would be off by more than a
    gradient whose terms cancel, as those of decays do.
    """
    found, weights = [], list[Tensor]()
    for function, wide in ((fast, None), (slow, torch.float64)):
        leaves = [t.to(wide or t.dtype, copy=True).requires_grad_() for t in inputs]
        outs = function(*leaves, *rest)
        outs = outs if isinstance(outs, tuple) else (outs,)
        outs = (rest[0].mask(outs[0]), *outs[1:])
        weights = weights or [torch.randn_like(t).to(inputs[0].dtype) for t in outs]
        found.append([*outs, *gradients(outs, leaves, weights)])
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or rms_ratio(got, wanted) < bound


def gradients(outs: Sequence[Tensor], leaves: list[Tensor], weights: list[Tensor]) -> tuple[Tensor | None, ...]:
    """By the leaves, of the outputs each times its weights."""
    return torch.autograd.grad(outs, leaves, [w.to(t) for w, t in zip(weights, outs, strict=True)], allow_unused=True)


def spaces(dtype: torch.dtype, where: str) -> list[Tensor]:
    """x, dt, A, B, C and a state: 4 heads of 8 channels, 2 groups of 16 numbers."""
    shapes = [(3, T, 4, 8), (3, T, 4), (4,), (3, T, 2, 16), (3, T, 2, 16), (3, 4, 8, 16)]
    x, dt, A, B, C, state = (torch.randn(s) for s in shapes)
    return [t.to(where) for t in (x.to(dtype), dt.exp(), -A.exp(), B.to(dtype), C.to(dtype), state)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", placements(T))
def test_ssd(library: str, where: str, dtype: torch.dtype) -> None:
    fast, segments = kernels("ssd", "mamba_ssm", library), placements(T, device(library))[where]
    inputs, bound = spaces(dtype, device(library)), 1e-3 if dtype == torch.float32 else 5e-3
    compare(fast.chunkwise, ssd.chunkwise, inputs, bound, segments, 64)
    compare(fast.parallel, ssd.parallel, inputs[:5], bound, segments)


@pytest.mark.parametrize("where", placements(T))
def test_selective_scan(library: str, where: str) -> None:
    fast, segments = kernels("selective_scan", "mamba_ssm", library), placements(T, device(library))[where]
    shapes = [(3, T, 12), (3, T, 12), (12, 5), (3, T, 5), (3, T, 5), (3, 12, 5)]
    x, dt, A, B, C, state = (torch.randn(s, device=device(library)) for s in shapes)
    inputs = [x, dt.exp() / 2, -A.exp(), B, C, state]
    compare(fast.chunkwise, scan.chunkwise, inputs, 1e-5, segments, 8)
    compare(fast.parallel, scan.parallel, inputs[:5], 1e-5, segments)


@pytest.mark.parametrize("operation", ["ssd", "selective_scan"])
@pytest.mark.parametrize("label", [None, [0, -1, 1]])
def test_a_token_alone(library: str, operation: str, label: list[int] | None) -> None:
    from eulerstack.segments import Segments

    fast, slow = kernels(operation, "mamba_ssm", library), {"ssd": ssd, "selective_scan": scan}[operation]
    start = torch.full((3,), 7, device=device(library))
    segments = Segments.dense(1, start)
    if label is not None:
        labels = torch.tensor(label, device=start.device)
        real, carries = labels[:, None] >= 0, labels != 1
        segments = Segments(real=real, carries=carries).placed(start, 1)
    shapes = [(3, 1, 12), (3, 1, 12), (12, 5), (3, 1, 5), (3, 1, 5), (3, 12, 5)]
    inputs = [torch.randn(s) for s in shapes] if operation == "selective_scan" else spaces(torch.float32, "cpu")
    inputs = [t.to(start.device) for t in inputs]
    inputs = [t[:, :1] if t.dim() > 2 and t.shape[1] == T else t for t in inputs]
    inputs[1], inputs[2] = inputs[1].exp(), -inputs[2].exp()
    compare(fast.recurrent, slow.recurrent, inputs, 1e-5, segments)
    before = inputs[5].clone()
    with torch.no_grad():
        got, wanted = fast.recurrent(*inputs, segments), slow.recurrent(*(t.double() for t in inputs), segments)
    for one, other in zip(got, wanted, strict=True):
        close(one.double(), other, 1e-5)
    assert torch.equal(inputs[5], before)


@pytest.mark.parametrize(("asked", "taken"), [(1, 16), (100, 64), (256, 256), (1000, 256)])
def test_ssd_takes_chunks_of_the_size_asked_for(
    library: str, asked: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, sizes = kernels("ssd", "mamba_ssm", library), []
    scanned = fast.mamba_chunk_scan_combined

    def scan_combined(*args: Any, **options: Any) -> Any:
        sizes.append(args[5])
        return scanned(*args, **options)

    monkeypatch.setattr(fast, "mamba_chunk_scan_combined", scan_combined)
    where = device(library)
    fast.chunkwise(*spaces(torch.float32, where), placements(T, where)["plain"], asked)
    assert sizes == [taken]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("where", placements(T))
def test_short_convolution(library: str, where: str, width: int) -> None:
    fast, segments = kernels("conv", "causal_conv1d", library), placements(T, device(library))[where]
    shapes = [(3, T, 16), (16, width), (16,), (3, width - 1, 16)]
    inputs = [torch.randn(s, device=device(library)) for s in shapes]
    compare(fast.convolve, conv.convolve, inputs, 1e-5, segments)


@pytest.mark.parametrize("made", ["plain", "capped", "alibi"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("where", placements(T))
def test_attention(library: str, where: str, window: int | None, made: str) -> None:
    fast, segments = kernels("attention", "flash_attn", library), placements(T, device(library))[where]
    inputs = [torch.randn(3, T, h, 16, device=device(library)).to(torch.float16) for h in (4, 2, 2)]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64) if made == "alibi" else None
    logits = Logits(0.3, 2.0 if made == "capped" else None, slopes)
    compare(fast.whole, attention.whole, inputs, 5e-3, segments, window, logits)


NEEDS: dict[str, dict[str, Any]] = {
    "ssd": {"numbers": 64},
    "selective_scan": {"numbers": 16},
    "conv": {"width": 4, "channels": 64},
    "attention": {"head_dim": 64, "value_dim": 64, "sinks": False, "capped_drop": False},
}
REFUSED = [
    ("ssd", "mamba_ssm", torch.float64, {}, "has no float64"),
    ("ssd", "mamba_ssm", torch.bfloat16, {"numbers": 512}, "d_state of up to 256"),
    ("selective_scan", "mamba_ssm", torch.float32, {"numbers": 512}, "d_state of up to 256"),
    ("conv", "causal_conv1d", torch.float32, {"width": 5}, "2 to 4 taps, not d_conv = 5"),
    ("conv", "causal_conv1d", torch.float32, {"channels": 12}, "multiples of 8 channels, not 12"),
    ("attention", "flash_attn", torch.float32, {}, "float16 and bfloat16, not float32"),
    ("attention", "flash_attn", torch.bfloat16, {"sinks": True}, "no attention sinks"),
    ("attention", "flash_attn", torch.bfloat16, {"capped_drop": True}, r"no attention weights \(attn_drop\) under"),
    ("attention", "flash_attn", torch.bfloat16, {"head_dim": 96}, "not 96 and 64"),
    ("attention", "flash_attn", torch.bfloat16, {"head_dim": 512, "value_dim": 512}, "heads of up to 256"),
]


@pytest.mark.parametrize(("operation", "provider", "dtype", "needs", "message"), REFUSED)
def test_what_a_kernel_has_not_is_refused_when_it_is_chosen(
    library: str, operation: str, provider: str, dtype: torch.dtype, needs: dict[str, Any], message: str
) -> None:
    if library == "real":
        pytest.importorskip(provider)
    needs = {**NEEDS[operation], **needs}
    with pytest.raises(ValueError, match=message):
        select(operation, Target(provider, "cuda", dtype), **needs)
    assert select(operation, Target("auto", "cuda", dtype), **needs).provider in ("torch", "triton")


@pytest.mark.parametrize(("operation", "provider"), [adapter.split(".") for adapter in ADAPTERS])
def test_what_is_present_serves_a_gpu_by_name(library: str, operation: str, provider: str) -> None:
    if library == "real":
        pytest.importorskip(provider)
    needs = NEEDS[operation]
    assert select(operation, Target(provider, "cuda", torch.bfloat16), **needs).provider == provider
    with pytest.raises(ValueError, match=r"runs on a GPU only|float16"):
        select(operation, Target(provider), **needs)


def test_doctor_finds_what_is_present(library: str) -> None:
    if library == "real":
        for adapter in ADAPTERS:
            pytest.importorskip(adapter.partition(".")[2])
    refusals = {f"{a.operation}.{a.provider}": a.refusal for a in survey(Target("auto", "cuda", torch.bfloat16))}
    assert [refusals[adapter] for adapter in ADAPTERS] == [None] * 4


def test_a_build_of_mamba_ssm_without_its_scan_is_refused_before_it_is_used(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    pytest.importorskip("mamba_ssm")
    with pytest.raises(ValueError, match=r"selective_scan_cuda is not installed .*MAMBA_KEEP_CUDA_BUILD=TRUE"):
        select("selective_scan", Target("mamba_ssm", "cuda"), numbers=16)


@pytest.mark.parametrize(("operation", "provider"), [(o, p) for o, names in PROVIDERS.items() for p in names])
def test_an_absent_library_is_a_reason_and_by_name_an_error_that_says_what_to_install(
    operation: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if provider in ("torch", "numba", "onednn"):
        pytest.skip("always here")
    library = {"fla": "fla"}.get(provider, provider)
    monkeypatch.setitem(sys.modules, library, None)
    for name in list(sys.modules):
        if name.startswith(f"{library}.") or name == f"eulerstack.kernels.{operation}.{provider}":
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"is not installed \(pip install [^)]+\)"):
        select(operation, Target(provider, "cuda", torch.bfloat16), **NEEDS.get(operation, {}))
