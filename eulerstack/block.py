"""One layer: a mixer and a channel mixer, normed and added to the residual stream."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .kernels.provider import Target
from .kernels.tracing import is_traced
from .layers.channels import ffn_flops, init_ffn, make_ffn, split_ffn
from .layers.init import draw_normal
from .layers.linear import is_hooked
from .layers.moe import MoE, Routing
from .layers.norm import Norm, make_norm
from .layers.selective import kept_products
from .layers.serve import serve
from .layers.share import WHOLE, Share, Split
from .mixers import Mixer, in_chunks, make_mixer
from .segments import Segments
from .spec import LayerSpec, StackSpec
from .state import LayerState

Local = Callable[[], AbstractContextManager[Any]]
"""Puts the parts that this process holds of parameters in their place, where several hold them together."""
Mix = Callable[[Tensor], tuple[Tensor, LayerState | None]]

SPAN = 4096  # a CPU's allocator hands out the tensors of more tokens from fresh pages, at up to twice the time


class Block(nn.Module):
    """x + scaling * mixer(norm x), then x + scaling * ffn(norm x), in the order the layer's spec names.

    Whole sequences also return how a mixture of experts routed them, for the training loss.
    """

    def __init__(self, layer: LayerSpec, stack: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width = stack.model.d_model
        self.layer, hints = layer, stack.training_hints
        self.dropout, self.init, self.checkpointing = hints.dropout, hints.init, hints.checkpointing
        self.mixer: Mixer[LayerState] = make_mixer(layer.mixer, stack, target)
        self.ffn = make_ffn(layer.ffn, width, layer.hidden)
        one_norm = self.ffn is None or layer.residual.type == "parallel"
        sandwich = layer.norm.position == "sandwich"
        self.mixer_norm = make_norm(layer.norm, width)
        self.mixer_out_norm = make_norm(layer.norm, width) if sandwich else None
        self.ffn_norm = None if one_norm else make_norm(layer.norm, width)
        self.ffn_out_norm = make_norm(layer.norm, width) if sandwich and not one_norm else None
        self.share = WHOLE
        self.local: Local = nullcontext
        self.choices = dict.fromkeys((*self.mixer.choices, *serve(self, target)))

    def forward(self, x: Tensor, segments: Segments) -> tuple[Tensor, Routing | None]:
        if self.checkpointing == "none" or not self.training or not torch.is_grad_enabled():
            return self._forward(x, segments)
        y: tuple[Tensor, Routing | None]
        if self.checkpointing == "selective":  # apart, for torch.compile reads the call as it stands
            y = checkpoint(self._forward, x, segments, use_reentrant=False, context_fn=kept_products)
        else:
            y = checkpoint(self._forward, x, segments, use_reentrant=False)
        return y

    def _forward(self, x: Tensor, segments: Segments) -> tuple[Tensor, Routing | None]:
        with self.local():
            return self._own_form(x, segments)

    def _own_form(self, x: Tensor, segments: Segments) -> tuple[Tensor, Routing | None]:
        if self._span(x) is not None and not isinstance(self.ffn, MoE) and not is_hooked(self.mixer):
            state = self.mixer.init_state(x.shape[0], 0, x.device, x.dtype)
            return self._spans(x, state, segments, None, self._drop)[0], None
        y, _, routing = self._run(x, segments, lambda h: (self.mixer(h, segments), None), self._drop)
        return y, routing

    def parallel(self, x: Tensor, segments: Segments) -> tuple[Tensor, Routing | None]:
        y, _, routing = self._run(x, segments, lambda h: (self.mixer.parallel(h, segments), None), self._drop)
        return y, routing

    def chunkwise(
        self, x: Tensor, state: LayerState, segments: Segments, chunk_size: int | None = None
    ) -> tuple[Tensor, LayerState]:
        return self._spans(x, state, segments, chunk_size)

    def _spans(
        self, x: Tensor, state: LayerState, segments: Segments, chunk_size: int | None, drop: float = 0.0
    ) -> tuple[Tensor, LayerState]:
        def part(x: Tensor, state: LayerState, segments: Segments) -> tuple[Tensor, LayerState]:
            y, after, _ = self._run(
                x, segments, lambda h: self.mixer.chunkwise(h, state, segments, chunk_size=chunk_size), drop
            )
            assert after is not None
            return y, after

        return in_chunks(part, x, state, segments, self._span(x))

    def continued(self, x: Tensor, state: LayerState, segments: Segments) -> tuple[Tensor, LayerState, Routing | None]:
        """The chunkwise form in training: with what it drops, and how a mixture of experts routed."""
        y, after, routing = self._run(x, segments, lambda h: self.mixer.chunkwise(h, state, segments), self._drop)
        assert after is not None
        return y, after, routing

    def recurrent(self, x: Tensor, state: LayerState, segments: Segments) -> tuple[Tensor, LayerState]:
        y, after, _ = self._run(x, segments, lambda h: self.mixer.recurrent(h, state, segments))
        assert after is not None
        return y, after

    def _span(self, x: Tensor) -> int | None:
        """How many tokens of a long sequence pass through the whole layer before the next ones."""
        return SPAN if self.mixer.chunked and x.is_cpu and not is_traced() and x.shape[1] > SPAN else None

    @property
    def _drop(self) -> float:
        """The share that whole sequences drop of what is added to the residual stream."""
        return self.dropout if self.training else 0.0

    def _run(
        self, x: Tensor, segments: Segments, mix: Mix, drop: float = 0.0
    ) -> tuple[Tensor, LayerState | None, Routing | None]:
        """The layer around any form of its mixer."""
        post, routing = self.layer.norm.position == "post", None
        h = self.share.enter(x if post else self.mixer_norm(x))
        mixed, state = mix(h)
        if self.layer.residual.type == "parallel":
            more, routing = self._channels(h, segments)
            mixed = mixed if more is None else mixed + more
        x = self._added(x, self.share.leave(mixed), self.mixer_norm, self.mixer_out_norm, drop)
        if self.ffn_norm is not None:
            h = self.share.enter(x if post else self.ffn_norm(x))
            more, routing = self._channels(h, segments)
            assert more is not None
            x = self._added(x, self.share.leave(more), self.ffn_norm, self.ffn_out_norm, drop)
        return x, state, routing

    def _channels(self, h: Tensor, segments: Segments) -> tuple[Tensor | None, Routing | None]:
        """The channel mixer, if there is one."""
        if isinstance(self.ffn, MoE):
            mixed: tuple[Tensor, Routing] = self.ffn(h, segments.real)
            return mixed
        return None if self.ffn is None else self.ffn(h), None

    def _added(self, x: Tensor, y: Tensor, norm: Norm, out_norm: Norm | None, drop: float) -> Tensor:
        """The residual stream with y in it; `norm` is the sublayer's own, applied after the sum where it is `post`."""
        scaling = self.layer.residual.scaling
        y = y if out_norm is None else out_norm(y)
        y = F.dropout(y, drop) if drop else y
        total = x + y if scaling == 1.0 else torch.add(x, y, alpha=scaling)
        return norm(total) if self.layer.norm.position == "post" else total

    def split(self, share: Share) -> Split:
        """Become one rank's share, as `Mixer.split`; norms are held whole. Raises ValueError, naming the layer."""
        ffn = self.ffn
        try:
            plans = {"mixer": self.mixer.split(share), "ffn": {} if ffn is None else split_ffn(ffn, share)}
        except ValueError as error:
            raise ValueError(f"layer {self.layer.index} ({self.layer.template}): {error}") from None
        self.share, own = share, {name for name, _ in self.named_parameters()}
        plan = {f"{part}.{name}": dim for part, split in plans.items() for name, dim in split.items()}
        return {name: dim for name, dim in plan.items() if name in own}

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of one sequence of `tokens`."""
        return self.mixer.flops(tokens) + ffn_flops(self.ffn, tokens)

    @property
    def idle_parameters(self) -> int:
        """Parameters that a token does not use: experts that are not chosen."""
        ffn = self.ffn
        return sum(p.numel() for p in ffn.parameters()) - ffn.active_parameters if isinstance(ffn, MoE) else 0

    def reset_parameters(self, out_scale: float) -> None:
        self.mixer.reset_parameters(out_scale)
        for norm in (self.mixer_norm, self.mixer_out_norm, self.ffn_norm, self.ffn_out_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.ffn is not None:
            init_ffn(self.ffn, out_scale)
        if self.init == "normal":
            draw_normal(self, out_scale)
