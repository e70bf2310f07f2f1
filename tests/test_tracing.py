"""What PyTorch traces computes what the stack computes: torch.export, make_fx, ONNX, torch.compile, torch.func."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import eulerstack as es
from eulerstack.testing import close

from .test_replaced_layers import FFNS, STACKS

TOKENS = torch.arange(66).reshape(2, 33) * 11 % 256
SHAPES = [(1, 2), (3, 7), (2, 33), (2, 100), (1, 129)]


def built(name: str, kernels: str = "auto") -> es.Stack:
    (kind, options), ffn = STACKS[name]
    builder = es.StackBuilder(d_model=16, n_heads=2, vocab_size=256, max_seq_len=256)
    torch.manual_seed(0)
    return builder.add(kind, options, ffn=FFNS[ffn], repeat=2).build(kernels=kernels).eval()


def exported(model: nn.Module, strict: bool = False) -> Any:
    """A program of open batch and time."""
    time = {0: Dim("batch", max=16), 1: Dim("time", min=2, max=256)}
    return torch.export.export(model, (TOKENS,), dynamic_shapes={"tokens": time}, strict=strict)


def agree(program: Callable[[Tensor], Tensor], model: es.Stack, shapes: list[tuple[int, int]]) -> None:
    for shape in shapes:
        tokens = torch.randint(0, 256, shape)
        close(program(tokens), model(tokens), 1e-5, f"logits of {shape}")


@pytest.mark.parametrize("kernels", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STACKS)
def test_an_exported_program_takes_any_batch_and_time(name: str, kernels: str) -> None:
    model = built(name, kernels)
    with torch.no_grad():
        agree(exported(model).module(), model, SHAPES)


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_a_program_that_is_exported_strictly(name: str) -> None:
    model = built(name)
    with torch.no_grad():
        agree(torch.export.export(model, (TOKENS,), strict=True).module(), model, [(2, 33)])


@pytest.mark.parametrize("name", STACKS)
def test_a_graph_of_make_fx(name: str) -> None:
    """Of one shape, for any tokens; with gradients on as well."""
    model = built(name)
    for grads in (False, True):
        with torch.set_grad_enabled(grads):
            agree(make_fx(model)(TOKENS), model, [(2, 33)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("name", STACKS)
def test_onnx_computes_the_same(name: str, tmp_path: Path) -> None:
    onnx_agrees(name, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["attention", "retnet", "mamba2"])
def test_onnx_of_the_three_mixers(name: str, tmp_path: Path) -> None:
    onnx_agrees(name, tmp_path)


def onnx_agrees(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = built(name), tmp_path / "stack.onnx"
    with torch.no_grad():
        torch.onnx.export(model, (TOKENS,), file, dynamo=True, verbose=False)
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        agree(lambda tokens: torch.from_numpy(session.run(None, {given.name: tokens.numpy()})[0]), model, [(2, 33)])


def test_torch_jit_trace_is_refused_with_what_to_use() -> None:
    with pytest.raises(ValueError, match=r"use torch\.export\.export"), pytest.warns(DeprecationWarning, match="trace"):
        torch.jit.trace(built("attention"), TOKENS)


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.slow
def test_a_stack_that_is_compiled_as_a_whole_computes_the_same() -> None:
    """By PyTorch's compiler without its code generator: what it follows, it follows in PyTorch's kernels."""
    model = built("retnet")
    with torch.no_grad():
        agree(torch.compile(model, backend="eager"), model, [(2, 33), (1, 8)])


def test_flops_are_counted_in_a_step_of_few_rows() -> None:
    """A dispatch mode sees each product, also where a loop of ours would take it."""
    from torch.utils.flop_counter import FlopCounterMode

    model = built("attention")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(TOKENS[:1, :2])
    wide = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("proj.weight", "embedding.weight")))
    assert counter.get_total_flops() >= 2 * 2 * wide


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of PyTorch itself
def test_forward_gradients_pass() -> None:
    """A product by a loop of ours would lose them without a word."""
    part = built("ffn mlp").layers["0"].ffn
    x, along = torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(part(forward_ad.make_dual(x, along))).tangent
    step = 1e-3
    with torch.no_grad():
        close(tangent, (part(x + step * along) - part(x - step * along)) / (2 * step), 1e-2)


def test_a_batch_by_vmap() -> None:
    layer = built("ffn mlp").layers["0"].ffn
    x = torch.randn(5, 2, 16)
    with torch.no_grad():
        close(torch.vmap(layer)(x), layer(x), 1e-5)
