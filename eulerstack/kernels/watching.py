"""What a step that is to be run again must not do: look at numbers, or draw some."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def uncertain(func: Any, args: Any) -> bool:
    """Whether the operation looks at numbers, or draws some."""
    if func._overloadpacket is aten.index:  # by numbers, the result is of their shape
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors_of(args[1]))
    return _looks(func)


@cache
def _looks(func: Any) -> bool:
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded} & set(func.tags)
    given = any("Tensor" in str(argument.type) for argument in func._schema.arguments)
    tells = any("Tensor" not in str(returned.type) for returned in func._schema.returns)
    read = func is aten.resolve_conj.default  # what `tolist` and `numpy` begin with
    return read or bool(tags) or (given and tells and func is not aten.is_set_to.default)


def tensors_of(given: Any) -> list[Tensor]:
    """The tensors among arguments or results, and in their lists."""
    if isinstance(given, Tensor):
        return [given]
    return [t for one in given for t in tensors_of(one)] if isinstance(given, list | tuple) else []
