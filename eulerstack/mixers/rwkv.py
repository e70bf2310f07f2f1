"""RWKV-4's time mixing (Peng et al. 2023, arXiv 2305.13048): a decayed, weighted mean of values, and a gate."""

import math

import torch
from torch import Tensor, nn

from ..kernels.conv.windows import joined, kept_inputs
from ..kernels.precision import wide
from ..kernels.provider import Target
from ..kernels.select import select
from ..layers.ffn import init_linear, matmul_flops
from ..layers.linear import project
from ..layers.precision import FullPrecision
from ..layers.share import Share, Split, columns
from ..segments import Segments
from ..spec import RWKVSpec, StackSpec
from ..state import WKVState
from .base import Mixer, check_one_token, checked, continued, placed

DEPTH = 0.5  # the reference's ramps depend on the layer's place, 0 to 1; a mixer does not know it, and takes the middle


class RWKV(Mixer[WKVState]):
    """o(sigmoid(r) * wkv(k, v)), with r, k and v each of a mix of the token and the one before it."""

    chunked = True

    def __init__(self, spec: RWKVSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width = stack.model.d_model
        self.spec, self.channels = spec, width
        self.choices = (select("wkv", target),)
        self.ops = self.choices[0].kernels
        self.mix_k = nn.Parameter(torch.empty(width))
        self.mix_v = nn.Parameter(torch.empty(width))
        self.mix_r = nn.Parameter(torch.empty(width))
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.r_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.time = FullPrecision({"decay": (width,), "bonus": (width,)})

    def parallel(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        segments = placed(segments, x)
        shift = self.init_state(x.shape[0], 0, x.device, x.dtype).shift
        gate, inputs, _ = self._inputs(x, shift, segments)
        return self._out(gate, self.ops.parallel(*inputs, segments), segments)

    def chunkwise(
        self, x: Tensor, state: WKVState, segments: Segments | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, WKVState]:
        segments, size = continued(segments), checked(chunk_size, self.spec.chunk_size)
        if x.shape[1] == 0:
            return x, state
        gate, inputs, shift = self._inputs(x, state.shift, segments)
        y, sums = self.ops.chunkwise(*inputs, (state.total, state.weight, state.top), segments, size)
        return self._out(gate, y, segments), WKVState(shift, *sums)

    def recurrent(self, x: Tensor, state: WKVState, segments: Segments | None = None) -> tuple[Tensor, WKVState]:
        check_one_token(x)
        segments = continued(segments)
        gate, inputs, shift = self._inputs(x, state.shift, segments)
        y, sums = self.ops.recurrent(*inputs, (state.total, state.weight, state.top), segments)
        return self._out(gate, y, segments), WKVState(shift, *sums)

    def dynamics(self, x: Tensor, segments: Segments) -> dict[str, Tensor]:
        return {"decay": torch.exp(-self.time.tensor("decay").exp())}

    def _inputs(self, x: Tensor, shift: Tensor, segments: Segments) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """The gate, (k, v [B, T, D], w, u [D]) of the kernels, and the input to mix with the next token."""
        before, shift = _before(x, shift, segments)
        k, v, r = (torch.lerp(before, x, mix.to(x.dtype)) for mix in (self.mix_k, self.mix_v, self.mix_r))
        r, k, v = project(r, self.r_proj), project(k, self.k_proj), project(v, self.v_proj)
        decay, bonus = self.time.tensor("decay").exp(), self.time.tensor("bonus")
        return torch.sigmoid(r), (k, v, decay, bonus), shift

    def _out(self, gate: Tensor, y: Tensor, segments: Segments) -> Tensor:
        return segments.mask(project(gate * y.to(gate.dtype), self.o_proj))

    def split(self, share: Share) -> Split:
        """By channels; the mixes are of the whole input."""
        self.share = share
        self.channels = share.divided(self.channels, "model.d_model")
        return {
            **columns(("k_proj.weight", "v_proj.weight", "r_proj.weight", "time.decay", "time.bonus")),
            "o_proj.weight": 1,
        }

    def init_state(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rollback: int = 0,
    ) -> WKVState:
        device, dtype = self.placement(device, dtype)
        sums = (torch.zeros(batch, self.channels, device=device, dtype=wide(dtype)) for _ in range(3))
        return WKVState(torch.zeros(batch, 1, len(self.mix_k), device=device, dtype=dtype), *sums)

    def flops(self, tokens: int) -> int:
        """Per token and channel: a weight and two sums for each token of half a chunk, and for the state."""
        return matmul_flops(self, tokens) + tokens * len(self.mix_k) * 6 * (min(self.spec.chunk_size, tokens) // 2 + 1)

    @torch.no_grad()
    def reset_parameters(self, out_scale: float = 1.0) -> None:
        """Decays, bonuses and mixes on RWKV-4's ramps over the channels, at the middle of its depth."""
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                init_linear(layer, out_scale if name == "o_proj" else 1.0)
        width = self.mix_k.shape[0]
        channel = torch.arange(width, device=self.mix_k.device)
        ramp, part = channel / max(width - 1, 1), channel / width
        self.time.get_parameter("decay").copy_(-5 + 8 * ramp ** (0.7 + 1.3 * DEPTH))
        self.time.get_parameter("bonus").copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        self.mix_k.copy_(part ** (1 - DEPTH))
        self.mix_v.copy_(part ** (1 - DEPTH) + 0.3 * DEPTH)
        self.mix_r.copy_(part ** (0.5 * (1 - DEPTH)))


def _before(x: Tensor, shift: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """The input before each token, zero at a document's start, and the last one [B, 1, D]."""
    if segments.plain:
        inputs = torch.cat([shift.to(x.dtype), x], 1)
        return inputs[:, :-1], inputs[:, -1:].to(shift.dtype, copy=True)
    inputs, label = joined(x, shift, segments)
    same = label[:, 1:] == label[:, :-1]
    kept = kept_inputs(inputs, label, segments, 1).to(shift.dtype)
    return torch.where(same[..., None], inputs[:, :-1], 0), kept
