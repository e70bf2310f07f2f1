"""Mixtures of experts (Shazeer et al. 2017, arXiv 1701.06538): a router gives each token to a few of many gated MLPs.

N real tokens make M = N * top_k choices. They are sorted by expert, so that each expert's tokens are one slice, and
only experts that were chosen compute. No token is dropped: a capacity would make a token's result depend on others.
"""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels.linear import torch as reference
from ..kernels.precision import wide
from ..kernels.provider import Kernel
from ..kernels.shapes import has_memory
from ..kernels.tracing import makes_program
from ..spec import GatedMLPSpec, MoEFFNSpec
from .ffn import GATES, GatedMLP, init_linear
from .loss import Average, unchanged
from .precision import FullPrecision, Precise
from .serve import Served
from .share import WHOLE, Share, Split


class Routing(NamedTuple):
    """How a call was routed, summed over its real tokens: what side losses and balancing need. At least float32."""

    mass: Tensor  # [E], the experts' probabilities
    z: Tensor  # scalar, logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906)
    load: Tensor  # [E], how many choices fell on each expert; no gradient
    tokens: Tensor  # scalar; no gradient

    def losses(self, average: Average = unchanged) -> tuple[Tensor, Tensor]:
        """E * sum_e (share of the choices)_e * (mean probability)_e, 1 if balanced (Fedus 2021), and the mean z.

        Both are zero without tokens. Where several processes route a batch together, `average` is that of a count
        over them, and the losses are the batch's in their mean.
        """
        load, tokens = average(self.load), average(self.tokens)
        share, tokens = load / load.sum().clamp(min=1e-9), tokens + (tokens == 0)
        return len(load) * torch.dot(share, self.mass / tokens), self.z / tokens


class Dispatch(NamedTuple):
    """M token-choices in the order of their experts."""

    order: Tensor  # [M] int64, choice n * top_k + j of each sorted place
    place: Tensor  # [M] int64, sorted place of each choice: the inverse of `order`
    load: Tensor  # [E] int64, choices of each expert
    slices: list[slice]  # E, the sorted places of each expert


class MoE(nn.Module):
    """Weighted sum of each token's top_k experts, plus experts that all tokens share (arXiv 2401.06066).

    The router's logits and probabilities are at least float32 whatever x is.
    """

    def __init__(self, spec: MoEFFNSpec, width: int, hidden: int) -> None:
        super().__init__()
        moe = spec.moe
        self.spec = moe
        self.router_proj = Precise(width, moe.experts, bias=False)
        self.experts = Experts(spec, width, hidden)
        shared = GatedMLPSpec(type="gated_mlp", activation=spec.activation)
        self.shared = GatedMLP(shared, width, moe.shared_experts * hidden) if moe.shared_experts else None
        self.correction = Correction(moe.experts, moe.bias_rate) if moe.bias_rate is not None else None
        self.hidden, self.share = hidden, WHOLE

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x [B, T, D]; padding, where `real` [B, T] is False, is not routed, and its output is zero."""
        flat = x.flatten(0, 1)
        rows = None if real is None else real.flatten().nonzero()[:, 0]
        tokens = flat if rows is None else flat.index_select(0, rows)
        weights, chosen, routing = self._route(tokens)
        y: Tensor = self.experts(tokens, weights, chosen)
        if self.shared is not None:
            y = y + self.shared(tokens)
        if rows is not None:
            y = y.new_zeros(flat.shape).index_copy(0, rows, y)
        return y.view(x.shape), routing

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor | Dispatch, Routing]:
        """Weights [N, top_k] of the experts chosen by tokens [N, D], where their choices go, and the statistics.

        A program for any tokens cannot know where: it has the experts chosen, [N, top_k].
        """
        logits = self.router_proj(tokens).to(wide(tokens.dtype))
        alone = self.share.once(logits)
        scores = self._scores(logits)
        chosen = self._ranking(scores.detach()).topk(self.spec.top_k).indices
        weights = scores.gather(1, chosen).softmax(1)
        if makes_program():
            none = torch.zeros(self.spec.experts, dtype=chosen.dtype, device=chosen.device)
            load = none.scatter_add(0, chosen.flatten(), torch.ones_like(chosen).flatten())
            return weights, chosen, _routing(alone, self._scores(alone), load)
        dispatch = _dispatch(chosen.flatten(), self.spec.experts)
        return weights, dispatch, _routing(alone, self._scores(alone), dispatch.load)

    def _scores(self, logits: Tensor) -> Tensor:
        """Log scores: a softmax of log-sigmoids is the sigmoids over their sum, also where they would all underflow."""
        return logits if self.spec.router == "softmax" else F.logsigmoid(logits)

    def _ranking(self, scores: Tensor) -> Tensor:
        """[N, E], what the choice goes by. The bias enters here only: it moves choices, not weights or gradients."""
        if self.correction is None:
            return scores
        return (scores if self.spec.router == "softmax" else scores.exp()) + self.correction.bias

    def split(self, share: Share) -> Split:
        """Each expert by its hidden channels; all ranks route alike."""
        share.divided(self.hidden, "the hidden width of an expert")
        self.share = share
        shared = {} if self.shared is None else self.shared.split(share)
        experts = {"experts.gate_proj.weight": 1, "experts.up_proj.weight": 1, "experts.down_proj.weight": 2}
        return {**experts, **{f"shared.{name}": dim for name, dim in shared.items()}}

    def rebalance(self, load: Tensor) -> None:
        """Move the balancing bias, if there is one, by the choices [E] of one optimizer step."""
        if self.correction is not None:
            self.correction.update(load)

    def flops(self, tokens: int) -> int:
        """Forward FLOPs over `tokens` tokens, counting a multiply-add as two."""
        return 2 * tokens * self.active_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses: the router's, those of top_k experts, and the shared ones."""
        one = sum(p.numel() for p in self.experts.parameters()) // self.spec.experts
        idle = (self.spec.experts - self.spec.top_k) * one
        return sum(p.numel() for p in self.parameters()) - idle

    def reset_parameters(self, out_scale: float = 1.0) -> None:
        """Draw the weights anew; the projections into the residual stream are scaled by `out_scale`."""
        init_linear(self.router_proj)
        self.experts.reset_parameters(out_scale)
        for name, layer in self.shared.named_children() if self.shared is not None else ():
            init_linear(layer, out_scale if name == "down_proj" else 1.0)
        if self.correction is not None:
            nn.init.zeros_(self.correction.bias)


class Correction(FullPrecision):
    """Balance without a loss (Wang et al. 2024, arXiv 2408.15664): a bias [E] on what the choice goes by."""

    bias: Tensor

    def __init__(self, experts: int, rate: float) -> None:
        super().__init__({}, {"bias": (experts,)})
        self.rate = rate

    @torch.no_grad()
    def update(self, load: Tensor) -> None:
        """Raise the bias of experts with less than the mean load [E], lower that of experts with more."""
        self.bias.add_(torch.sign(load.mean() - load), alpha=self.rate)


class StackedLinear(nn.Module, Served):
    """Weights [E, out, in] of E linear layers."""

    operation = "linear"
    ops = staticmethod(reference.linear)

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def reset_parameters(self, scale: float = 1.0) -> None:
        """As init_linear draws each of them."""
        bound = scale / self.weight.shape[2] ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)


class Experts(nn.Module):
    """E gated MLPs, their weights stacked."""

    def __init__(self, spec: MoEFFNSpec, width: int, hidden: int) -> None:
        super().__init__()
        experts = spec.moe.experts
        self.gated = GATES[spec.activation]
        self.gate_proj = StackedLinear(experts, width, hidden)
        self.up_proj = StackedLinear(experts, width, hidden)
        self.down_proj = StackedLinear(experts, hidden, width)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor | Dispatch) -> Tensor:
        """The sum of the experts' outputs for tokens x [N, D], by weights [N, top_k]; in the dtype of a linear's."""
        stacked = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        x, gate, up, down = (_as_autocast(t) for t in (x, *stacked))
        if isinstance(chosen, Tensor):
            return self._by_all(x, weights, chosen, gate, up, down)
        dispatch = chosen
        sent: Tensor = _Send.apply(x, dispatch, weights.shape[1])
        gated, through = self.gated, partial(_Linears.apply, dispatch.slices, self.down_proj.ops)
        y: Tensor = _Gather.apply(through(gated(through(sent, gate), through(sent, up)), down), weights, dispatch)
        return y

    def _by_all(self, x: Tensor, weights: Tensor, chosen: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Every expert computes every token, E / top_k times the work; those that were not chosen weigh nothing."""
        hidden = self.gated(torch.einsum("nd,ehd->neh", x, gate), torch.einsum("nd,ehd->neh", x, up))
        share = torch.zeros(x.shape[0], gate.shape[0], dtype=x.dtype, device=x.device)
        share = share.scatter(1, chosen, weights.to(x.dtype))
        return torch.einsum("neh,edh,ne->nd", hidden, down, share)

    def reset_parameters(self, out_scale: float) -> None:
        self.gate_proj.reset_parameters()
        self.up_proj.reset_parameters()
        self.down_proj.reset_parameters(out_scale)


@torch.no_grad()
def _dispatch(chosen: Tensor, experts: int) -> Dispatch:
    """Sorts choices [M], by expert; those without memory are counted as balanced ones."""
    ranked, order = chosen.sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    bounds = torch.searchsorted(ranked, torch.arange(experts + 1, device=chosen.device))
    ends = bounds.tolist() if has_memory(bounds) else [len(order) * e // experts for e in range(experts + 1)]
    return Dispatch(order, place, bounds.diff(), [slice(*both) for both in pairwise(ends)])


def _routing(logits: Tensor, scores: Tensor, count: Tensor) -> Routing:
    """The statistics of logits and log scores [N, E], and of the choices, count [E]; all zero without tokens."""
    z, tokens = logits.logsumexp(1).square().sum(), logits.new_full((), logits.shape[0])
    return Routing(scores.softmax(1).sum(0), z, count.to(logits.dtype), tokens)


def _as_autocast(t: Tensor) -> Tensor:
    """t in the dtype that a linear layer would compute in: autocast does not see inside autograd functions."""
    device = t.device.type
    if t.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return t
    dtype: torch.dtype = torch.get_autocast_dtype(device)
    return t.to(dtype)


class _Send(torch.autograd.Function):
    """x [N, D] -> [M, D], a row for each choice. Its backward sums through the inverse: no rows are added in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch, top_k: int) -> Tensor:
        ctx.save_for_backward(dispatch.place)
        ctx.top_k = top_k
        return x.index_select(0, dispatch.order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        (grad,) = grads
        return grad.index_select(0, place).unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class _Linears(torch.autograd.Function):
    """Sorted rows x [M, in], each slice of them through its expert's weight of [E, out, in], by a linear operation.

    Each product is written to its slice of one tensor; in the backward, to its part of the stacked gradient.
    """

    @staticmethod
    def forward(ctx: Any, slices: list[slice], linear: Kernel, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.slices, ctx.linear = slices, linear
        y = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in enumerate(slices):
            if rows.start < rows.stop:  # a step of decoding chooses few of many
                y[rows] = linear(x[rows], (weight[expert],), (None,))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        for_x = torch.empty_like(x) if ctx.needs_input_grad[2] else None
        for_weight = torch.empty_like(weight) if ctx.needs_input_grad[3] else None
        for expert, rows in enumerate(ctx.slices):
            if for_x is not None:
                for_x[rows] = ctx.linear(grad[rows], (weight[expert].T,), (None,))
            if for_weight is not None:  # a product over no rows is zero
                for_weight[expert] = ctx.linear(grad[rows].T, (x[rows].T,), (None,))
        return None, None, for_x, for_weight


class _Gather(torch.autograd.Function):
    """y [M, D], weights [N, top_k] -> [N, D], the weighted sums of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(y, weights, dispatch.order, dispatch.place)
        rows = y.index_select(0, dispatch.place).unflatten(0, weights.shape)
        return torch.bmm(weights[:, None].to(y.dtype), rows)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, order, place = ctx.saved_tensors
        (grad,) = grads
        sent = grad.index_select(0, order // weights.shape[1])
        for_weights = torch.linalg.vecdot(sent, y).index_select(0, place)
        for_y = sent * weights.flatten()[order, None]
        return for_y.to(y.dtype), for_weights.view_as(weights).to(weights.dtype), None
