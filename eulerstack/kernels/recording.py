"""A step of decoding on a CPU, recorded once and run again and again, as a CUDA graph is.

A step of a small stack is some hundred operations, and Python takes longer to ask for them than the CPU to do them.
What a recording saw it does again on the same memory, in the same order: loops of ours that follow each other in one
parallel region, PyTorch's operations with their results where they were.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any, Self

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .compiled import heard, openmp, shared, this_thread
from .small import Loop, loops
from .watching import tensors_of, uncertain

aten = torch.ops.aten
Entry = Callable[[], Any]


def recorded(step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
    """The step's result, and what takes it again into that tensor; None where another time might do otherwise."""
    with Recording() as recording:
        result = step()
    return result, None if recording.refused else recording.program()


class Recording(TorchDispatchMode):
    """What runs in this thread, in inference mode, while it is entered, as one Program.

    refused: whether something was seen that another time might do otherwise: a number was read, a shape or a path
    depends on one, or one was drawn.
    """

    sees_our_loops = True

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Loop | Entry] = []
        self.kept: list[Any] = []
        self.refused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether PyTorch shall hide this from torch.compile, whose import takes a second; no step is compiled."""
        return False

    def __enter__(self) -> Self:
        heard.by = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        heard.by = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.refused = self.refused or uncertain(func, args)
        self.kept.append((args, kwargs, result))
        self.entries.extend(_again(func, args, kwargs or {}, result))
        return result

    def loop(self, function: int, pointers: Any, threads: int, *kept: Any) -> None:
        """A loop of ours ran on PyTorch's threads."""
        self.entries.append(Loop(function, pointers, threads, kept))

    def call(self, entry: Entry) -> None:
        """Something else of ours ran, which holds what it needs."""
        self.entries.append(entry)

    def program(self) -> "Program":
        return Program(self.entries, self.kept)


class Program:
    """Recorded entries on the memory that they were recorded on.

    Raises IndexError where PyTorch would, for a place that a tensor does not have.
    """

    def __init__(self, entries: Sequence[Loop | Entry], kept: Any) -> None:
        self._kept = kept
        self._failed = [entry.failed for entry in entries if isinstance(entry, Loop) and entry.alone]
        self._entries: list[Entry] = []
        for small, run in groupby(entries, lambda entry: isinstance(entry, Loop)):
            several: Any = [*run]
            self._entries.extend([_region(several)] if small else several)

    def __call__(self) -> None:
        for entry in self._entries:
            entry()
        if any(failed[0] for failed in self._failed):
            raise IndexError("a recorded step was to write where a tensor has no place")


def _again(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Iterator[Loop | Entry]:
    """What does the operation again: nothing, for a view, for what is not filled, and for what is always the same."""
    results = tensors_of(result)
    if func in SETTLED or "empty" in func._overloadpacket.__name__:
        return
    if not _writes(func) and _is_view(results, args):
        return
    if (small := loops(func, args, kwargs, result)) is not None:
        yield from small
    elif _writes(func):
        yield partial(func, *args, **kwargs)
    elif (found := _out_variant(func)) is not None:
        into, name = found
        yield partial(into, *args, **{k: v for k, v in kwargs.items() if k not in FACTORY}, **{name: results[0]})
    else:
        yield partial(_copied, func, args, kwargs, results)


SETTLED = {aten.detach_.default, aten.arange.default, aten.arange.start, aten.arange.start_step}
"""What need not be done again: nobody writes into a range."""


def _copied(func: Any, args: Any, kwargs: dict[str, Any], into: list[Tensor]) -> None:
    new = tensors_of(func(*args, **kwargs))
    for old, now in zip(into, new, strict=True):
        assert old.shape == now.shape, f"{func} made {tuple(now.shape)} of what gave {tuple(old.shape)}"
        old.copy_(now)


def _is_view(results: list[Tensor], args: Any) -> bool:
    """Whether the result lies in the memory of what was given."""
    given = {t.untyped_storage().data_ptr() for t in tensors_of(args) if t.numel()}
    return all(not t.numel() or t.untyped_storage().data_ptr() in given for t in results)


@cache
def _writes(func: Any) -> bool:
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)


FACTORY = {"dtype", "layout", "device", "pin_memory"}
"""What a variant that writes into a given tensor need not be told."""


ROUNDS_TWICE = {aten.linear.default}
"""What rounds a product before it adds the bias when it is to write into a tensor, and after that otherwise."""


@cache
def _out_variant(func: Any) -> tuple[Any, str] | None:
    """The same operation writing into a tensor, and the name of that argument."""
    for name in () if func in ROUNDS_TWICE else func._overloadpacket.overloads():
        other = getattr(func._overloadpacket, name)
        into = [a.name for a in other._schema.arguments if a.is_out]
        if len(into) == len(func._schema.returns) == 1 and _given(other) == _given(func):
            return other, into[0]
    return None


def _given(func: Any) -> list[tuple[str, str]]:
    """Names and types of what an operation is given."""
    return [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out and a.name not in FACTORY]


def _region(loops: list[Loop]) -> Entry:
    """Loops one after the other in one parallel region, whose threads wait for each other between them."""
    fields = [(loop.function, ctypes.addressof(loop.pointers), loop.alone) for loop in loops]
    table = (ctypes.c_int64 * (1 + 3 * len(loops)))(len(loops), *(field for loop in fields for field in loop))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(table))
    return partial(_run, shared(_all_loops), pointers, max(loop.threads for loop in loops), (table, loops))


def _run(function: int, pointers: Any, threads: int, kept: Any) -> None:
    """On no more threads than PyTorch has now: in the child of a fork, which must have one, a team would not come."""
    openmp()(function, pointers, min(threads, torch.get_num_threads()), 0)


def _all_loops(pointers: Any) -> None:
    count: Any = carray(pointers[0], 1, np.int64)
    table: Any = carray(pointers[0], 1 + 3 * count[0], np.int64)
    before = True
    for i in range(count[0]):
        alone = table[3 + 3 * i] != 0
        if not (alone and before):
            _wait()
        if not alone or this_thread() == 0:
            _call(table[1 + 3 * i], table[2 + 3 * i])
        before = alone


_wait: Any = types.ExternalFunction("GOMP_barrier", types.void())


def _called(_: Any, function: Any, argument: Any) -> Any:
    """Call the C function at an address with a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        called = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [pointer]).as_pointer())
        builder.call(called, [builder.inttoptr(args[1], pointer)])
        return context.get_dummy_value()

    return numba.void(numba.int64, numba.int64), generate


_call: Any = intrinsic(_called)
