"""SSD in PyTorch (Dao and Gu 2024, arXiv 2405.21060), by the duality of the paper's title.

With q = C, k = B, v = dt x and log decay = dt A the state space is retention with a decay a token, and its state is
retention's transposed. So the three forms are retention's.
"""

from torch import Tensor

from ...segments import Segments
from ..precision import wide
from ..provider import Forms, Provider, anywhere
from ..retention import torch as retention


def parallel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments) -> Tensor:
    """The quadratic dual form over a whole sequence, without an earlier state. Returns y [B, T, H, P]."""
    return retention.parallel(C, B, *retained(x, dt, A), segments)


def recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """One token (T = 1) that continues `state`. Returns y [B, 1, H, P] and the state after it."""
    y, state = retention.recurrent(C, B, *retained(x, dt, A), state.mT, segments)
    return y, state.mT


def chunkwise(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Segments, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """T tokens that continue `state`, in chunks of at most `chunk_size`. Returns y [B, T, H, P] and the state."""
    y, state = retention.chunkwise(C, B, *retained(x, dt, A), state.mT, segments, chunk_size)
    return y, state.mT


def retained(x: Tensor, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """v and log decay."""
    dtype = wide(x.dtype)
    return x.to(dtype) * dt.to(dtype)[..., None], dt.double() * A.double()


PROVIDER = Provider(Forms(parallel, chunkwise, recurrent), anywhere)
