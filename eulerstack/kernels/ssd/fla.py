"""SSD by flash-linear-attention: its duality with retention."""

from torch import Tensor

from ...segments import Segments
from ..provider import Forms, Provider
from ..retention import fla as retention
from .torch import parallel, recurrent, retained


def chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state`. Returns y [B, T, H, P] and the state after them."""
    y, state = retention.chunkwise(C, B, *retained(x, dt, A), state.mT, segments, chunk_size)
    return y, state.mT


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), retention.refuses)
