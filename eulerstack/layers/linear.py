"""Linear layers: nn.Linear itself, computed by the kernels that were chosen when the stack was built.

A layer may become any other module (an adapter, a quantised layer), and hooks may watch it. Such a layer is called; the
weights of its neighbours are never read in its place.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from ..kernels.linear import FEW, rows
from ..kernels.linear import torch as reference
from ..kernels.provider import Kernel
from ..kernels.shapes import PLAIN
from ..kernels.tracing import is_traced

_HOOKS_OF_ALL = (
    every_module._global_forward_pre_hooks,
    every_module._global_forward_hooks,
    every_module._global_backward_pre_hooks,
    every_module._global_backward_hooks,
)


def project(x: Tensor, *layers: nn.Module) -> Tensor:
    """The outputs of linear layers side by side, x [..., in] -> [..., sum of out]."""
    if all(map(is_bare, layers)):
        y: Tensor = kernel_of(layers[0])(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
        return y
    return torch.cat([_apply(x, layer) for layer in layers], -1) if len(layers) > 1 else _apply(x, layers[0])


def project_each(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """The output of each of several linear layers. Few rows meet all weights in one call."""
    if is_traced() or rows(x) > FEW or not all(map(is_bare, layers)):
        return [_apply(x, layer) for layer in layers]
    widths = [cast(nn.Linear, layer).out_features for layer in layers]
    parts: Sequence[Tensor] = project(x, *layers).split(widths, -1)
    return parts


def kernel_of(layer: nn.Module) -> Kernel:
    """The linear operation that a layer was given when its stack was built; PyTorch's where it was given none."""
    kernel: Kernel = getattr(layer, "ops", reference.linear)
    return kernel


def is_bare(layer: nn.Module, kind: type[nn.Linear] = nn.Linear) -> bool:
    """Whether calling a layer does no more than its class says: no subclass, no hook, no special weights."""
    own = type(layer) is kind and type(layer.weight) in PLAIN and "forward" not in vars(layer)
    return own and not is_hooked(layer)


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks are to run when the module is called."""
    own = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(own) or any(_HOOKS_OF_ALL)


def _apply(x: Tensor, layer: nn.Module) -> Tensor:
    """A layer by its kernel, or by what it is now."""
    y: Tensor = kernel_of(layer)(x, (layer.weight,), (layer.bias,)) if is_bare(layer) else layer(x)
    return y
