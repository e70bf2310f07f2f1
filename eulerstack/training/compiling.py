"""Layers as compiled graphs: torch.compile, in place, so that names in checkpoints stay as they are."""

from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from ..block import Block
from ..layers.moe import MoE
from ..model import Stack

SHAPES = 8
"""Graphs a layer may have: training and validation, and a validation's last, shorter batch, with room to spare."""


def compile_blocks(stack: Stack) -> None:
    """Compile every layer's forward when it is first called; layers that are alike share a graph.

    Called after checkpointing is set. A graph is of one shape; a batch of another makes one more. Mixtures of experts
    stay as they are: how many tokens chose an expert is another number in every batch. Raises ValueError where layers
    cannot be compiled: loops of Numba would cut them into dozens of graphs, slower than none, and there must be a
    compiler.
    """
    blocks = [module for module in stack.modules() if isinstance(module, Block)]
    loops = sorted({choice.operation for block in blocks for choice in block.choices if choice.provider == "numba"})
    if loops:
        raise ValueError(
            f"--model.compile true: the kernels of {', '.join(loops)} are compiled by Numba already, which PyTorch's "
            "compiler cannot look into; add --model.kernels torch, or leave --model.compile out"
        )
    _check_compiler(next(stack.parameters()).device)
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES * len(blocks))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    for block in blocks:
        if isinstance(block.ffn, MoE):
            block.ffn.forward = torch.compiler.disable(block.ffn.forward)  # type: ignore[method-assign]
        block.compile(dynamic=False)


def _check_compiler(device: torch.device) -> None:
    """Raises ValueError where code for this device cannot be compiled."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "--model.compile true needs a C++ compiler, and there is none: install g++ (or name one in CXX), or leave "
            "--model.compile out"
        ) from error
    if device.type == "cuda" and not has_triton():
        raise ValueError("--model.compile true needs Triton on a GPU: pip install triton, or leave --model.compile out")
