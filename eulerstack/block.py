"""One layer: a mixer and a channel mixer, normed and added to the residual stream."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kernels.provider import Target
from .layers.ffn import init_ffn, make_ffn
from .layers.norm import make_norm
from .mixers import Mixer, make_mixer
from .mixers.base import matmul_flops
from .segments import Segments
from .spec import LayerSpec, StackSpec
from .state import LayerState

Mix = Callable[[Tensor], tuple[Tensor, LayerState | None]]


class Block(nn.Module):
    """x + scaling * mixer(norm x), then x + scaling * ffn(norm x), in the order the layer's spec names."""

    def __init__(self, layer: LayerSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width = stack.model.d_model
        self.layer = layer
        self.mixer: Mixer[LayerState] = make_mixer(layer.mixer, stack, target)
        self.mixer_norm = make_norm(layer.norm, width)
        self.ffn = make_ffn(layer.ffn, width, layer.hidden)
        one_norm = self.ffn is None or layer.residual.type == "parallel"
        self.ffn_norm = None if one_norm else make_norm(layer.norm, width)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return self._run(x, lambda h: (self.mixer(h, segments), None))[0]

    def parallel(self, x: Tensor, segments: Segments) -> Tensor:
        return self._run(x, lambda h: (self.mixer.parallel(h, segments), None))[0]

    def chunkwise(
        self, x: Tensor, state: LayerState, segments: Segments, chunk_size: int | None = None
    ) -> tuple[Tensor, LayerState]:
        y, after = self._run(x, lambda h: self.mixer.chunkwise(h, state, segments, chunk_size=chunk_size))
        assert after is not None
        return y, after

    def recurrent(self, x: Tensor, state: LayerState, segments: Segments) -> tuple[Tensor, LayerState]:
        y, after = self._run(x, lambda h: self.mixer.recurrent(h, state, segments))
        assert after is not None
        return y, after

    def _run(self, x: Tensor, mix: Mix) -> tuple[Tensor, LayerState | None]:
        """The layer around any form of its mixer."""
        pre = self.layer.norm.position == "pre"
        h = self.mixer_norm(x) if pre else x
        mixed, state = mix(h)
        if self.ffn is not None and self.layer.residual.type == "parallel":
            mixed = mixed + self.ffn(h)
        x = self._add(x, mixed)
        if not pre:
            x = self.mixer_norm(x)
        return self._then_ffn(x, pre), state

    def _then_ffn(self, x: Tensor, pre: bool) -> Tensor:
        if self.ffn is None or self.ffn_norm is None:
            return x
        if pre:
            return self._add(x, self.ffn(self.ffn_norm(x)))
        y: Tensor = self.ffn_norm(self._add(x, self.ffn(x)))
        return y

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        scaling = self.layer.residual.scaling
        return x + y if scaling == 1.0 else torch.add(x, y, alpha=scaling)

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of one sequence of `tokens`."""
        return self.mixer.flops(tokens) + (0 if self.ffn is None else matmul_flops(self.ffn, tokens))

    def reset_parameters(self, out_scale: float) -> None:
        self.mixer.reset_parameters(out_scale)
        self.mixer_norm.reset_parameters()
        if self.ffn is not None:
            init_ffn(self.ffn, out_scale)
        if self.ffn_norm is not None:
            self.ffn_norm.reset_parameters()
