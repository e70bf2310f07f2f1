"""The contract of every sequence mixer: three forms, one result.

Shapes throughout the package: B batch, T tokens, D model width, H heads, K key width, V value width, G groups of
heads, N SSM state, P channels a head, W convolution width, S cache slots. `[B, T, H, K]` is batch first.

| form                     | what it computes                                             |
|--------------------------|--------------------------------------------------------------|
| parallel(x)              | a whole sequence, without an earlier state                   |
| chunkwise(x, state)      | T tokens that continue a state; returns the state after them |
| recurrent(x, state)      | one token that continues a state                             |

All three agree to rounding, for any split of a sequence, with gradients. `forward` takes the form the spec names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.select import Choice
from ..layers.precision import FullPrecision
from ..layers.share import WHOLE, Share, Split
from ..segments import Segments
from ..state import LayerState

S = TypeVar("S", bound=LayerState)


class Mixer(nn.Module, ABC, Generic[S]):
    """A sequence mixer, [B, T, D] -> [B, T, D]. `segments` are placed (they have positions); see Segments.

    A padding token is not mixed, enters no state, and its output is zero. After a call the state belongs to the last
    document of each row. A state that goes in is consumed; under no_grad its buffers may be written in place.
    """

    grows: ClassVar[bool] = False  # whether the state needs room for every token
    chunked: bool = False  # whether `forward` is the chunkwise form, from an empty state
    choices: tuple[Choice, ...] = ()  # the kernels it was built with, and why
    share: Share = WHOLE  # of its heads or channels, where several ranks hold it together

    @abstractmethod
    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """A whole sequence without an earlier state; positions start at zero unless `segments` say otherwise."""

    @abstractmethod
    def chunkwise(
        self, x: Tensor, state: S, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, S]:
        """T tokens that continue `state`, in chunks of at most `chunk_size` (the spec's by default)."""

    @abstractmethod
    def recurrent(self, x: Tensor, state: S, segments: Segments | None = None) -> tuple[Tensor, S]:
        """One token, x [B, 1, D], that continues `state`."""

    @abstractmethod
    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> S:
        """An empty state. `dtype` (the weights' by default) is the model's; recurrent parts are at least float32."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Forward FLOPs of one sequence of `tokens`, counting a multiply-add as two."""

    @abstractmethod
    def reset_parameters(self, out_scale: float = 1.0) -> None:
        """Draw the weights anew; the output projection is scaled by `out_scale`."""

    def placement(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[torch.device, torch.dtype]:
        """Where the mixer is, and the dtype of its weights, where a state is not asked for elsewhere, or in another.

        No layer is asked by name, for it may have been replaced by one that holds its numbers in another way.
        """
        if device is not None and dtype is not None:
            return torch.device(device), dtype
        own = [t for part in self.modules() if not isinstance(part, FullPrecision) for t in _tensors_of(part)]
        like = next((t for t in own if t.is_floating_point()), torch.empty(0, device=own[0].device if own else "cpu"))
        return torch.device(device or like.device), dtype or like.dtype

    def split(self, share: Share) -> Split:
        """Become one rank's share of itself, and say of which parameters a rank holds which part.

        A share computes from the whole x; the shares' outputs add up to the mixer's. Parameters that are held whole
        get the gradient of the share's part. Raises ValueError where there is no such split.
        """
        raise ValueError(f"{type(self).__name__} has no plan for tensor parallelism; train it with tensor_parallel 1")

    def memo(self) -> object:
        """What the mixer keeps of its weights for later calls: another object as soon as it has to be made anew."""
        return None

    def dynamics(self, x: Tensor, segments: Segments) -> dict[str, Tensor]:
        """What to watch of its recurrence on inputs x [B, T, D]: `decay`, what a token leaves of a state, and `dt`."""
        return {}

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """The form the spec names, over a whole sequence."""
        if not self.chunked:
            return self.parallel(x, segments)
        state = self.init_state(x.shape[0], 0, x.device, x.dtype)
        return self.chunkwise(x, state, placed(segments, x))[0]


def _tensors_of(part: nn.Module) -> Iterator[Tensor]:
    """What a module itself holds."""
    return (t for t in (*part._parameters.values(), *part._buffers.values()) if t is not None)


def placed(segments: Segments | None, x: Tensor) -> Segments:
    """Segments with positions; a sequence of its own where there are none."""
    if segments is None:
        return Segments.dense(x.shape[1], device=x.device)
    if segments.position is None:
        return segments.placed(torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), x.shape[1])
    return segments


def continued(segments: Segments | None) -> Segments:
    """Segments that continue a state; a mixer cannot know the position itself."""
    if segments is None or segments.position is None:
        raise ValueError("a mixer called with a state needs segments with positions: Segments.dense(tokens, start=...)")
    return segments


def score_scale(width: int, base: int) -> float:
    """What products of queries and keys of `width` channels are multiplied with: 1 / sqrt(width) at muP's base.

    Beyond it 1 / width (arXiv 2203.03466, definition 4.1): trained queries and keys are no longer independent.
    """
    return float(width**-0.5 * (base / width) ** 0.5)


def checked(chunk_size: int | None, default: int) -> int:
    """The chunk size asked for, or the default; raises ValueError for one below 1."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} must be 1 or more")
    return default if chunk_size is None else chunk_size


def in_chunks(
    chunk: Callable[[Tensor, S, Segments], tuple[Tensor, S]],
    x: Tensor,
    state: S,
    segments: Segments | None,
    chunk_size: int | None,
) -> tuple[Tensor, S]:
    """`chunk` over parts of x of at most `chunk_size` tokens, one after the other; the whole x is one by default."""
    segments, size = continued(segments), checked(chunk_size, max(1, x.shape[1]))
    if x.shape[1] <= size:
        return chunk(x, state, segments)
    parts, start = [], 0
    for part in x.split(size, 1):
        stop = start + part.shape[1]
        y, state = chunk(part, state, segments.slice(start, stop))
        parts.append(y)
        start = stop
    return torch.cat(parts, 1), state


def check_one_token(x: Tensor) -> None:
    """Raises ValueError unless x is [B, 1, D]."""
    if x.shape[1] != 1:
        raise ValueError(f"recurrent takes one token, got x of {x.shape[1]}; use chunkwise for more")
