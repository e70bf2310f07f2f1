"""What a model is made of now, and whether its weights are still those that something was made of."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.shapes import PLAIN

SAMPLES = 16
"""Numbers of a tensor that are looked at; many more, and a look would take as long as a step."""


class Parts:
    """The modules of a model as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [*model.modules()]
        self._children = [m._modules for m in self.modules]
        self._noted = self._now()
        self._held: list[dict[str, Any]] = [held for m in self.modules for held in (m._parameters, m._buffers)]

    def are_current(self) -> bool:
        """Whether no module was replaced, added or removed since."""
        return self._now() == self._noted

    def tensors(self) -> Iterator[Tensor]:
        """The modules' parameters and buffers, as they are now."""
        return (t for t in chain.from_iterable(map(dict.values, self._held)) if t is not None)

    def _now(self) -> list[nn.Module | None]:
        return [*chain.from_iterable(map(dict.values, self._children))]


class WeightsWatch:
    """Notices that weights were changed, replaced or moved since it last looked.

    Of each tensor it compares the place in memory, how often PyTorch saw it written, and SAMPLES numbers spread over
    it, since a write through `.data` (an average of weights that changes places with them, a merged adapter) leaves
    the other two as they were. Only such a write that spares all of these numbers goes unnoticed. Of a tensor that
    stands for others, as a quantised one does, it knows when it is replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._look()

    def changed(self) -> bool:
        """Whether they were since the last time that it was asked, or since it was made."""
        same = self.parts.are_current() and self._places() == self.places and torch.equal(self._numbers(), self.numbers)
        if not same:
            self._look()
        return not same

    def _look(self) -> None:
        self.parts = Parts(self.model)
        self.places = self._places()
        self.samples = [torch.empty(0), *(_sample(t) for t in self.parts.tensors() if type(t) in PLAIN)]
        self.numbers = self._numbers()

    def _places(self) -> list[tuple[int, int]]:
        """Where each tensor lies, and how often it was written, which inference tensors do not count."""
        plain = [(t, type(t) in PLAIN) for t in self.parts.tensors()]
        return [(t.data_ptr() if own else id(t), 0 if t.is_inference() else t._version) for t, own in plain]

    def _numbers(self) -> Tensor:
        """The samples of all tensors, as bytes: NaN is equal to itself."""
        return torch.cat(self.samples).view(torch.uint8)


@torch.no_grad()
def _sample(tensor: Tensor) -> Tensor:
    """A view of some numbers of a tensor, SAMPLES or a few more, all where it has fewer."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat[:: max(1, flat.numel() // SAMPLES)]
