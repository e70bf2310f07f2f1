"""SSD on a CPU: its duality with retention, whose chunks Numba compiles."""

from torch import Tensor

from ...segments import Segments
from ..provider import Forms, Provider, on_cpu
from ..retention import numba as retention
from ..retention.step import recurrent as step
from .torch import parallel, retained


def chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state`, in chunks of at most `chunk_size`. Returns y [B, T, H, P] and the state."""
    y, state = retention.chunkwise(C, B, *retained(x, dt, A), state.mT, segments, chunk_size)
    return y, state.mT


def recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """One token (T = 1) that continues `state`. Returns y [B, 1, H, P] and the state after it."""
    y, state = step(C, B, *retained(x, dt, A), state.mT, segments)
    return y, state.mT


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), on_cpu)
