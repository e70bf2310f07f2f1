"""minGRU (Feng et al. 2024, arXiv 2410.01201): h_t = (1 - z_t) h_{t-1} + z_t v_t; z and v depend on token t alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, cat, nn, where, zeros

from eulerstack.kernels.precision import wide
from eulerstack.layers.ffn import init_linear, matmul_flops
from eulerstack.mixers import Mixer, check_one_token, continued, in_chunks, placed
from eulerstack.state import LayerState


@dataclass(frozen=True)
class MinGRUState(LayerState):
    KINDS: ClassVar = {"hidden": "hidden"}
    hidden: Tensor  # [B, 1, E], at least float32


class MinGRU(Mixer[MinGRUState]):
    def __init__(self, spec, stack, target):
        super().__init__()
        width, self.inner = stack.model.d_model, spec.expand * stack.model.d_model
        self.chunked, self.chunk_size = True, spec.chunk_size  # `forward` is the chunkwise form
        self.z_proj, self.v_proj = (nn.Linear(width, self.inner, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(self.inner, width, bias=False)

    def reset_parameters(self, out_scale=1.0):
        for layer in self.children():
            init_linear(layer, out_scale if layer is self.o_proj else 1.0)

    def init_state(self, batch, max_tokens, device=None, dtype=None, *, rollback=0):
        device, dtype = self.placement(device, dtype)
        return MinGRUState(zeros(batch, 1, self.inner, device=device, dtype=wide(dtype)))

    def flops(self, tokens):
        return matmul_flops(self, tokens) + 4 * tokens * self.inner

    def parallel(self, x, segments=None):
        return self._continue(x, self.init_state(x.shape[0], 0, dtype=x.dtype), placed(segments, x))[0]

    def chunkwise(self, x, state, segments=None, *, chunk_size=None):
        return in_chunks(self._continue, x, state, segments, self.chunk_size if chunk_size is None else chunk_size)

    def recurrent(self, x, state, segments=None):
        check_one_token(x)
        keep, new = self._terms(x, continued(segments))
        hidden = keep * state.hidden + new
        return segments.mask(self.o_proj(hidden.to(x.dtype))), MinGRUState(hidden)

    def _terms(self, x, segments):
        """keep and new [B, T, E] of h_t = keep_t h_{t-1} + new_t: a document's start keeps nothing, padding all."""
        z = self.z_proj(x).to(wide(x.dtype)).sigmoid()
        if segments.plain:
            return 1 - z, z * self.v_proj(x)
        real, starts = segments.label >= 0, segments.running.diff(dim=1, prepend=segments.running[:, :1] * 0) != 0
        return where(real[..., None], (1 - z) * ~starts[..., None], 1), z * self.v_proj(x) * real[..., None]

    def _continue(self, x, state, segments):
        """All tokens at once: each doubling lets `new` sum twice as many tokens, which `keep` spans."""
        keep, new = self._terms(x, segments)
        keep, new = cat([state.hidden * 0, keep], 1), cat([state.hidden, new], 1)
        for step in (2**i for i in range(x.shape[1].bit_length())):
            new = cat([new[:, :step], new[:, step:] + keep[:, step:] * new[:, :-step]], 1)
            keep = cat([keep[:, :step], keep[:, step:] * keep[:, :-step]], 1)
        return segments.mask(self.o_proj(new[:, 1:].to(x.dtype))), MinGRUState(new[:, -1:])
