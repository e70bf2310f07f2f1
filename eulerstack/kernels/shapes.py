"""What memory a tensor has: those of memory.py have a shape and none."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Tensors that are their numbers: a quantised weight, or one spread over ranks, multiplies in a way of its own."""


def has_memory(tensor: Tensor) -> bool:
    """False where there are no numbers to read or to write."""
    return not isinstance(tensor, FakeTensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is float32 in this machine's memory; tensors that stand for others, such as a shard's, are not."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter)
