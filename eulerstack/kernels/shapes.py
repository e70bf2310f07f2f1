"""Tensors that have a shape and no memory: a training step is counted with them (memory.py)."""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_memory(tensor: Tensor) -> bool:
    """False where there are no numbers to read or to write."""
    return not isinstance(tensor, FakeTensor)
