"""Placeholder so that imports work until the real file lands."""

from typing import Any, NamedTuple

from torch import Tensor, nn


class Routing(NamedTuple):
    balance: Tensor
    z: Tensor
    load: Tensor


class MoE(nn.Module):
    active_parameters = 0

    def __init__(self, spec: Any, width: int, hidden: int) -> None:
        super().__init__()
        raise NotImplementedError
