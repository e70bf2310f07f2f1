"""Modules whose tensors stay at least float32 whatever the model's dtype becomes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.precision import wide, without_autocast
from ..kernels.shapes import PLAIN


class Precise(nn.Linear):
    """A small linear layer that computes in at least float32, whatever its weights and inputs are held in."""

    @without_autocast
    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        if type(self.weight) not in PLAIN:  # one that is quantised multiplies in its own way
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class FullPrecision(nn.Module):
    """A room for tensors that stay at least float32: log decays, dt biases, D, balancing biases.

    `shapes` are its parameters', `buffers` those of its buffers, which start at zero.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], buffers: dict[str, tuple[int, ...]] | None = None) -> None:
        super().__init__()
        dtype = wide(torch.get_default_dtype())
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))
        for name, shape in (buffers or {}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def tensor(self, name: str) -> Tensor:
        """A parameter, or what stands for it: the part of it that a rank holds."""
        found = self._parameters[name]
        assert found is not None
        return found

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """`.to(bfloat16)` and its like move the tensors, but never below float32."""

        def keep(t: Tensor) -> Tensor:
            changed: Tensor = fn(t)
            dtype = wide(changed.dtype)
            return changed if changed.dtype == dtype else t.to(changed.device, dtype)

        return super()._apply(keep, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        """Weights of a narrow checkpoint are widened before they are copied, or assigned."""
        for name in (*self._parameters, *self._buffers):
            given = state_dict.get(prefix + name)
            if given is not None:
                state_dict[prefix + name] = given.to(wide(given.dtype))
        super()._load_from_state_dict(state_dict, prefix, *rest)
