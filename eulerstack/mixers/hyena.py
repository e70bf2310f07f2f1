"""Hyena (Poli et al. 2023, arXiv 2302.10866): long convolutions with gates between them."""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.conv.windows import taps_of
from ..kernels.precision import wide, without_autocast
from ..kernels.provider import Target
from ..kernels.select import select
from ..kernels.tracing import is_traced
from ..layers.ffn import init_linear, matmul_flops
from ..layers.linear import is_bare, project
from ..layers.precision import Precise
from ..layers.share import Share, Split, columns
from ..segments import Segments
from ..spec import HyenaSpec, StackSpec
from ..state import HistoryState
from .base import Mixer, check_one_token, continued, in_chunks, placed
from .cached import written
from .mamba import ShortConv

BANDS = 8  # sines and cosines of the position that a filter is made of
FREQUENCY = 10.0  # of the sine activations at the start
FASTEST = 5.0  # how many times as fast as the slowest channel's the fastest's filter falls
FALLEN = 1e-2  # what is left of the slowest after its time


@dataclass(frozen=True, eq=False)
class _Kept:
    """Taps, and the numbers of the weights that they were made of."""

    taps: Tensor
    weights: list[bytes]


_is_bare = partial(is_bare, kind=Precise)


class Filter(nn.Module):
    """taps [S, depth, D] of absolute distance: a small sine network times an exponential window a channel.

    They do not depend on the sequence's length, so that a prefix gives a prefix.
    """

    def __init__(self, spec: HyenaSpec, width: int, longest: int) -> None:
        super().__init__()
        self.depth, self.width, self.longest, self.decay = spec.depth, width, longest, spec.filter_decay
        self.in_proj = Precise(1 + 2 * BANDS, spec.filter_hidden)
        self.mid_proj = Precise(spec.filter_hidden, spec.filter_hidden)
        self.out_proj = Precise(spec.filter_hidden, spec.depth * width, bias=False)
        self._kept: _Kept | None = None

    @without_autocast
    def forward(self, length: int, like: Tensor) -> Tensor:
        """The first `length` taps, at least float32. On a CPU, without gradients, they are kept for the next call."""
        keeps = like.is_cpu and not torch.is_grad_enabled() and not is_traced() and all(map(_is_bare, self._layers))
        if not keeps:
            return self._taps(length, like)
        length, kept = 1 << (length - 1).bit_length(), self.memo()
        if kept is None or len(kept.taps) < length or kept.taps.dtype != wide(like.dtype):
            kept = self._kept = _Kept(self._taps(length, like), self._weights())
        return kept.taps[:length]

    def memo(self) -> "_Kept | None":
        """The taps that are kept, if there are any and they are of the weights as they are now.

        Every number is compared, for a write through `.data` changes neither a weight's place nor its version.
        """
        return self._kept if self._kept is not None and self._kept.weights == self._weights() else None

    def _weights(self) -> list[bytes]:
        """The numbers of all weights: bytes are compared in a tenth of the time of tensors, NaN too."""
        with torch._C._DisableTorchDispatch():  # no part of a step that is recorded
            held = (t for layer in self._layers for t in layer._parameters.values() if t is not None)
            return [t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in held]

    @property
    def _layers(self) -> tuple[Precise, ...]:
        return self.in_proj, self.mid_proj, self.out_proj

    def _taps(self, length: int, like: Tensor) -> Tensor:
        dtype = wide(like.dtype)
        place = torch.arange(length, dtype=torch.float64, device=like.device)[:, None]
        angle = 2 * math.pi * place / self.longest * torch.arange(1, BANDS + 1, device=like.device)
        x = torch.cat([place / self.longest, angle.cos(), angle.sin()], -1).to(dtype)
        for layer in (self.in_proj, self.mid_proj):
            x = torch.sin(FREQUENCY * layer(x).to(dtype))
        taps = self.out_proj(x).to(dtype).unflatten(-1, (self.depth, self.width))
        windowed: Tensor = taps * self._window(place).to(dtype)[:, None]
        return windowed

    def _window(self, place: Tensor) -> Tensor:
        """[S, D] float64, of unit energy: rates from the slowest channel's to the fastest's, evenly in their logs."""
        slowest = -math.log(FALLEN) / (self.decay * self.longest)
        share = torch.linspace(0, 1, self.width, dtype=torch.float64, device=place.device)
        rate = slowest * FASTEST**share
        window: Tensor = (1 - torch.exp(-2 * rate)).sqrt() * torch.exp(-rate * place)
        return window

    def reset_parameters(self) -> None:
        for layer in (self.in_proj, self.mid_proj, self.out_proj):
            init_linear(layer)


class Stream(nn.Module):
    """A projection of the input, and the short convolution that it passes: a gate, or v."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)
        self.conv = ShortConv(width, taps)


class Hyena(Mixer[HistoryState]):
    """v = x_i * (h_i * v + d_i v) for each of `depth` gates x_i; gates and v pass a short convolution first.

    Its state is the history of what the long convolutions took in, so that it grows with every token.
    """

    grows = True

    def __init__(self, spec: HyenaSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width = stack.model.d_model
        self.spec, self.width = spec, width
        self.choices = (select("long_conv", target),)
        self.ops = self.choices[0].kernels
        self.streams = nn.ModuleList(Stream(width, spec.d_conv) for _ in range(spec.depth + 1))
        self.filter = Filter(spec, width, stack.model.max_seq_len)
        self.skip = nn.Parameter(torch.empty(spec.depth, width))
        self.out_proj = nn.Linear(width, width, bias=False)

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        segments = placed(segments, x)
        if x.shape[1] == 0:
            return x
        empty = self.init_state(x.shape[0], 0, x.device, x.dtype).conv
        streams, _ = self._streams(x, empty, segments)
        taps = self._taps(x.shape[1], x)
        v, gates = streams[-1], streams[:-1]
        for i, gate in enumerate(gates):
            v = self._gated(gate, v, self.ops.parallel(v, taps[:, i], segments), i)
        return segments.mask(project(v, self.out_proj))

    def chunkwise(
        self, x: Tensor, state: HistoryState, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, HistoryState]:
        """Chunks over the history and themselves; the whole x is one chunk by default."""
        return in_chunks(self._chunk, x, state, segments, chunk_size)

    def _chunk(self, x: Tensor, state: HistoryState, segments: Segments) -> tuple[Tensor, HistoryState]:
        streams, conv = self._streams(x, state.conv, segments)
        taps, inputs = self._taps(self._reach(state, segments), x), []
        v = streams[-1]
        for i, gate in enumerate(streams[:-1]):
            inputs.append(v)
            v = self._gated(gate, v, self.ops.chunkwise(v, taps[:, i], state.inputs[:, :, i], segments), i)
        after = HistoryState(written(state.inputs, torch.stack(inputs, 2), segments), conv)
        return segments.mask(project(v, self.out_proj)), after

    def recurrent(
        self, x: Tensor, state: HistoryState, segments: Segments | None = None
    ) -> tuple[Tensor, HistoryState]:
        """One token: its sum over the history, which holds it by then."""
        check_one_token(x)
        segments = continued(segments)
        streams, conv = self._streams(x, state.conv, segments)
        taps, histories = self._taps(self._reach(state, segments), x), []
        v = streams[-1]
        for i, gate in enumerate(streams[:-1]):
            histories.append(written(state.inputs[:, :, i], v, segments))
            v = self._gated(gate, v, self.ops.recurrent(v, taps[:, i], histories[-1], segments), i)
        return segments.mask(project(v, self.out_proj)), HistoryState(torch.stack(histories, 2), conv)

    def memo(self) -> object:
        return self.filter.memo()

    def _streams(self, x: Tensor, conv: Tensor, segments: Segments) -> tuple[tuple[Tensor, ...], Tensor]:
        """The gates and v, [B, T, D] each, and the short convolution's state."""
        projs, convs = [s.proj for s in self._each], [s.conv for s in self._each]
        weight, bias = torch.cat([c.weight for c in convs]), torch.cat([c.bias for c in convs])
        mixed, conv = taps_of(project(x, *projs), weight.to(x.dtype), bias.to(x.dtype), conv, segments)
        return mixed.split(self.width, -1), conv

    @property
    def _each(self) -> list[Stream]:
        return list(cast(list[Stream], self.streams))

    def _taps(self, length: int, like: Tensor) -> Tensor:
        """The filters [S, depth, D] of this rank's channels."""
        return self.share.part(self.filter(length, like), 2)

    def _gated(self, gate: Tensor, v: Tensor, filtered: Tensor, stage: int) -> Tensor:
        return gate * (filtered.to(v.dtype) + self.skip[stage] * v)

    def _reach(self, state: HistoryState, segments: Segments) -> int:
        """How many taps the call can need."""
        assert segments.position is not None
        tokens = segments.position.shape[1]
        return state.inputs.shape[1] if segments.bound is None else min(state.inputs.shape[1], segments.bound + tokens)

    def split(self, share: Share) -> Split:
        """By channels; the filters' network is held whole."""
        self.share, self.width = share, share.divided(self.width, "model.d_model")
        names = ("proj.weight", "conv.weight", "conv.bias")
        parts = columns(f"streams.{i}.{name}" for i in range(len(self.streams)) for name in names)
        return {**parts, "skip": 1, "out_proj.weight": 1}

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> HistoryState:
        (device, dtype), depth = self.placement(device, dtype), self.spec.depth
        inputs = torch.zeros(batch, max_tokens, depth, self.width, device=device, dtype=dtype)
        conv = torch.zeros(batch, self.spec.d_conv - 1, (depth + 1) * self.width, device=device, dtype=dtype)
        return HistoryState(inputs, conv)

    def flops(self, tokens: int) -> int:
        """Three transforms of twice the length for each stage and channel, 5 n log2 n / 2 each, and the filters."""
        n = 2 * tokens
        transforms = 3 * self.spec.depth * self.width * round(2.5 * n * math.log2(max(n, 2)))
        taps = 2 * self.spec.d_conv * (self.spec.depth + 1) * self.width * tokens
        return matmul_flops(self, tokens) + transforms + taps

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        for stream in self._each:
            init_linear(stream.proj)
            stream.conv.reset_parameters()
        init_linear(self.out_proj, out_scale)
        self.filter.reset_parameters()
        nn.init.ones_(self.skip)
