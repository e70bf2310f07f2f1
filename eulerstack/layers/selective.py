"""Which outputs of a layer `checkpointing: selective` keeps: those that take long to compute again.

Korthikanti et al. 2022 (arXiv 2205.05198) compute again what is cheap and large. Here the products by weights and
attention are kept; norms, gates, activations, scores of a chunk and recurrences are computed again. It is chosen by
operation, so that it holds for every mixer.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

_aten = torch.ops.aten
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten._grouped_mm.default}
ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}


def kept_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What torch.utils.checkpoint runs a layer under, forward and again."""
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if kept(op, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


def kept(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A convolution of one group is a product (kernels/linear/onednn.py).

    Attention that drops weights draws: not run again, it would leave other numbers to what draws behind it.
    """
    if op is _aten.convolution.default:
        return bool(args[8] == 1)
    return op in PRODUCTS or (op in ATTENTION and _given(op, "dropout_p", args, kwargs) == 0)


def _given(op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of an argument, by its place or by its name, or 0."""
    names = [argument.name for argument in op._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}.get(name, 0)
