"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): training sees further than the next token."""

from typing import cast

import torch
from torch import Tensor, nn

from .block import Block
from .kernels.provider import Target
from .layers.ffn import init_linear, matmul_flops
from .layers.init import draw_normal
from .layers.moe import Routing
from .layers.norm import Norm, make_norm
from .segments import IGNORED, Segments
from .spec import LayerSpec, NormSpec, StackSpec


class Ahead(nn.Module):
    """h' = layers(W [norm h; norm e]): the stream h [B, T, D] of each token, with the embedding e of a later one."""

    def __init__(self, plan: tuple[LayerSpec, ...], norm: NormSpec, stack: StackSpec, target: Target) -> None:
        super().__init__()
        width, self.init = stack.model.d_model, stack.training_hints.init
        self.stream_norm, self.token_norm = make_norm(norm, width), make_norm(norm, width)
        self.proj = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList(Block(layer, stack, target) for layer in plan)
        self.norm: Norm = make_norm(norm, width)

    def forward(self, h: Tensor, e: Tensor, segments: Segments) -> tuple[Tensor, dict[int, Routing]]:
        """The new stream, before `norm`, and how its mixtures of experts routed, by layer."""
        h, routings = self.proj(torch.cat([self.stream_norm(h), self.token_norm(e)], -1)), {}
        for block in self.blocks:
            h, routing = block(h, segments)
            if routing is not None:
                routings[block.layer.index] = routing
        return h, routings

    @property
    def blocks(self) -> list[Block]:
        return list(cast(list[Block], self.layers))

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of one sequence of `tokens`."""
        return matmul_flops(self.proj, tokens) + sum(block.flops(tokens) for block in self.blocks)

    def reset_parameters(self, out_scale: float) -> None:
        norms: list[Norm] = [self.stream_norm, self.token_norm, self.norm]
        for norm in norms:
            norm.reset_parameters()
        init_linear(self.proj)
        if self.init == "normal":
            draw_normal(self.proj, 1.0)
        for block in self.blocks:
            block.reset_parameters(out_scale)


def later(x: Tensor, steps: int, fill: int = 0) -> Tensor:
    """x [B, T, ...] moved `steps` tokens to the front, `fill` behind it."""
    tokens = x.shape[1]
    tail = x.new_full((x.shape[0], min(steps, tokens), *x.shape[2:]), fill)
    return torch.cat([x[:, steps:], tail], 1)


def later_targets(targets: Tensor, steps: int, segments: Segments) -> Tensor:
    """targets [B, T] of the token `steps` further on: ignored where that one is of another document, or padding."""
    moved = later(targets, steps, IGNORED)
    if segments.plain:
        return moved
    same = (later(segments.label, steps, -1) == segments.label) & (segments.label >= 0)
    return torch.where(same, moved, IGNORED)
