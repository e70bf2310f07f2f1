"""Stack: embedding, layers, norm and head, in the same three forms as its mixers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .block import Block, Local
from .groups import check_groups
from .kernels.provider import Target
from .kernels.select import check_name, select
from .layers.linear import is_bare
from .layers.loss import Average, next_token_loss, unchanged
from .layers.moe import MoE, Routing
from .layers.norm import make_norm
from .layers.serve import serve
from .multitoken import Ahead, later, later_targets
from .mup import STANDARD, mup
from .paths import expand_home
from .segments import Segments
from .spec import MoEFFNSpec, StackSpec, ahead, dump, expand, spec_of
from .state import LayerState, StackState

EMBEDDING_STD = 0.02
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Stack(nn.Module):
    """tokens [B, T] int64 -> logits [B, T, vocab_size].

    `forward` runs each mixer in the form its spec names; `parallel`, `chunkwise` and `recurrent` run that form in all
    layers. The four agree to rounding.
    """

    def __init__(self, spec: StackSpec, target: Target = Target()) -> None:
        super().__init__()
        width, vocab = spec.model.d_model, spec.model.vocab_size
        self.spec = spec
        self.plan = expand(spec)
        self.local: Local = nullcontext
        self.embedding = nn.Embedding(vocab, width)
        own = (layer for layer in self.plan if layer.weights_of == layer.index)
        self.layers = nn.ModuleDict({str(layer.index): Block(layer, spec, target) for layer in own})
        self.norm = make_norm(self.plan[-1].norm, width)
        self.head = None if spec.tied else nn.Linear(width, vocab, bias=False)
        serve(self.norm, target)
        self.linear = select("linear", target).kernels
        self.ahead = nn.ModuleList(Ahead(plan, self.plan[-1].norm, spec, target) for plan in ahead(spec))
        self.mup = STANDARD if spec.model.mup is None else mup(self, Stack(spec.base, target), spec)

    @property
    def blocks(self) -> list[Block]:
        """Every layer's block, first to last; layers that share weights have the same."""
        return [cast(Block, self.layers[str(layer.weights_of)]) for layer in self.plan]

    @property
    def grows(self) -> bool:
        """Whether some layer keeps every token, so that max_seq_len is a limit."""
        return any(block.mixer.grows for block in self.blocks)

    def forward(self, tokens: Tensor, segments: Segments | None = None) -> Tensor:
        with self.local():
            return self._logits(self._sequence(tokens, self._placed(tokens, segments), Block.__call__)[0])

    def parallel(self, tokens: Tensor, segments: Segments | None = None) -> Tensor:
        """Every mixer in its parallel form, whatever its spec names."""
        return self._logits(self._sequence(tokens, self._placed(tokens, segments), Block.parallel)[0])

    def chunkwise(
        self,
        tokens: Tensor,
        state: StackState,
        segments: Segments | None = None,
        *,
        chunk_size: int | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """Continue `state` by T tokens. Raises ValueError where its KV caches have no room for them.

        at: [B, N] int64, the tokens whose logits are wanted, [B, N, V]; those of all by default. A prompt needs one.
        """
        return self._step(tokens, state, segments, lambda b, x, s, g: b.chunkwise(x, s, g, chunk_size), at)

    def recurrent(
        self, tokens: Tensor, state: StackState, segments: Segments | None = None
    ) -> tuple[Tensor, StackState]:
        """Continue `state` by one token, tokens [B, 1]."""
        return self._step(tokens, state, segments, Block.recurrent)

    def init_state(self, batch: int, max_tokens: int | None = None, *, rollback: int = 0) -> StackState:
        """An empty state for `batch` rows of up to `max_tokens` tokens (max_seq_len by default).

        `rollback` is the largest rollback that windowed caches shall allow. Raises ValueError where a template says
        that it keeps no state, or where max_tokens is more than the model's max_seq_len.
        """
        limit = self.spec.model.max_seq_len
        max_tokens = limit if max_tokens is None else max_tokens
        if batch < 0 or max_tokens < 1 or rollback < 0:
            raise ValueError(f"batch = {batch}, max_tokens = {max_tokens} or rollback = {rollback} is too small")
        self.check_length(max_tokens)
        self.check_keeps_state()
        layers = tuple(b.mixer.init_state(batch, max_tokens, rollback=rollback) for b in self.blocks)
        length = torch.zeros(batch, dtype=torch.int64, device=self.embedding.weight.device)
        return StackState(layers, length, length.clone(), 0, max_tokens, rollback)

    def check_keeps_state(self) -> None:
        """Raises ValueError where a template says that it keeps no state."""
        for block in self.blocks:
            if not block.layer.state.kept:
                raise ValueError(
                    f"layer_templates.{block.layer.template}.state is false: layer {block.layer.index} keeps no state, "
                    "so it has no chunkwise or recurrent form; remove the key to generate from this stack"
                )

    def check_length(self, tokens: int, training: bool = False) -> None:
        """Raises ValueError for sequences longer than the stack can hold."""
        limit, blocks = self.spec.model.max_seq_len, self.by_index.values() if training else self.blocks
        if tokens > limit and any(block.mixer.grows for block in blocks):
            raise ValueError(
                f"{tokens} tokens are more than model.max_seq_len = {limit}, and this stack has attention without a "
                "window; shorten the sequence or raise model.max_seq_len"
            )

    def losses(
        self, tokens: Tensor, targets: Tensor, segments: Segments | None = None, average: Average = unchanged
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total training loss and its named parts; targets of -100 do not count.

        The total is the sum of the scalar parts. Beside them `router_load/LAYER` [E] counts what each expert was chosen
        for, and `ahead/STEPS` is what the module that looks so many tokens further adds to `multi_token`.
        average: the mean of a count over the processes that share a batch; the mean of their losses is the batch's.
        """
        with self.local():
            return self._losses(tokens, targets, segments, average)

    def _losses(
        self, tokens: Tensor, targets: Tensor, segments: Segments | None, average: Average
    ) -> tuple[Tensor, dict[str, Tensor]]:
        placed = self._placed(tokens, segments, training=True)
        x, routings = self._sequence(tokens, placed, Block.__call__)
        parts, ahead = self._scores(x, targets, average), dict[str, Tensor]()
        if self.spec.head.mtp is not None:
            weight = self.spec.head.mtp.train_loss_weight
            losses = self._ahead(x, tokens, targets, placed, routings, average)
            parts["multi_token"] = weight * torch.stack(losses).mean()
            ahead = {f"ahead/{steps}": weight / len(losses) * loss for steps, loss in enumerate(losses, start=1)}
        total, parts = self._total(parts, routings, average)
        return total, {**parts, **ahead}

    def losses_from(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: StackState,
        segments: Segments | None = None,
        average: Average = unchanged,
    ) -> tuple[Tensor, dict[str, Tensor], StackState]:
        """`losses` of rows that continue `state`, in the chunkwise form, and the state after them, without gradient.

        Raises ValueError where its caches have no room for them. Nothing is checkpointed, and no module looks ahead.
        """
        routings: dict[int, Routing] = {}
        index = count()

        def form(block: Block, x: Tensor, before: LayerState, placed: Segments) -> tuple[Tensor, LayerState]:
            x, after, routing = block.continued(x, before, placed)
            here = next(index)
            if routing is not None:
                routings[here] = routing
            return x, after

        with self.local():
            x, after = self._walked(tokens, state, segments, form)
            loss, parts = self._total(self._scores(x, targets, average), routings, average)
        return loss, parts, after.map(lambda t: t.detach().clone())  # and not a view of the whole row

    def _scores(self, x: Tensor, targets: Tensor, average: Average) -> dict[str, Tensor]:
        z_loss = self.spec.training_hints.z_loss
        entropy, z = self._loss(self.norm(x), targets, average, with_z=z_loss > 0)
        return {"cross_entropy": entropy} | ({"z": z_loss * z} if z_loss else {})

    def _total(
        self, parts: dict[str, Tensor], routings: dict[int, Routing], average: Average
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the parts and of the routers' losses; beside them, the routers' loads."""
        parts |= self._router_losses(routings, average)
        loads = {f"router_load/{index}": routing.load for index, routing in routings.items()}
        return torch.stack(list(parts.values())).sum(), {**parts, **loads}

    def _ahead(
        self,
        x: Tensor,
        tokens: Tensor,
        targets: Tensor,
        segments: Segments,
        routings: dict[int, Routing],
        average: Average,
    ) -> list[Tensor]:
        """The losses of the modules that look further ahead; their routings join the others."""
        losses = []
        for steps, module in enumerate(self._heads, start=1):
            x, routed = module(x, self._embedded(later(tokens, steps)), segments)
            routings |= routed
            losses.append(self._loss(module.norm(x), later_targets(targets, steps, segments), average)[0])
        return losses

    @property
    def _heads(self) -> list[Ahead]:
        return list(cast(list[Ahead], self.ahead))

    @property
    def by_index(self) -> dict[int, Block]:
        """Every layer's block, those of the modules that look ahead behind the others."""
        more = {block.layer.index: block for module in self._heads for block in module.blocks}
        return {**dict(enumerate(self.blocks)), **more}

    def _router_losses(self, routings: dict[int, Routing], average: Average) -> dict[str, Tensor]:
        """What the routers add to the loss, weighted by their layers' coefficients."""
        if not routings:
            return {}
        blocks = self.by_index
        specs = {index: blocks[index].layer.ffn for index in routings}
        moes = {index: ffn.moe for index, ffn in specs.items() if isinstance(ffn, MoEFFNSpec)}
        shared = self.spec.training_hints.router_aux_loss_coef
        own = {i: shared if moe.load_balance_coef is None else moe.load_balance_coef for i, moe in moes.items()}
        found = {i: routing.losses(average) for i, routing in routings.items()}
        balance = [own[i] * balance for i, (balance, _) in found.items()]
        z = [moes[i].z_loss * z for i, (_, z) in found.items()]
        return {"load_balance": torch.stack(balance).sum(), "router_z": torch.stack(z).sum()}

    def rebalance(self, loads: dict[int, Tensor]) -> None:
        """Move the balancing biases of routers that have one; called once an optimizer step, loads by layer."""
        blocks, by_weights = self.by_index, dict[Block, Tensor]()
        for index, load in loads.items():
            block = blocks[index]
            by_weights[block] = by_weights[block] + load if block in by_weights else load
        for block, load in by_weights.items():
            if isinstance(block.ffn, MoE):
                block.ffn.rebalance(load)

    def flops(self, tokens: int, training: bool = False) -> int:
        """Forward FLOPs of one sequence of `tokens`; of `losses`, with the modules that look ahead, if `training`."""
        more = self._heads if training else []
        heads = (1 + len(more)) * 2 * tokens * self.spec.model.d_model * self.spec.model.vocab_size
        return heads + sum(b.flops(tokens) for b in self.blocks) + sum(m.flops(tokens) for m in more)

    def fingerprint(self) -> str:
        """A hash of the spec and of every weight: what a saved state belongs to."""
        digest = hashlib.sha256(dump(self.spec).encode())
        for name, weight in self.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew: outputs into the residual stream are scaled by 1 / sqrt(how many there are)."""
        for _, draw in self.drawing():
            draw()

    def drawing(self) -> Iterator[tuple[nn.Module, Callable[[], Any]]]:
        """The parts of the stack in the order in which their weights are drawn, each with what draws them."""
        for part, draw in self._parts():
            yield part, partial(self._drawn, part, draw)

    def _parts(self) -> Iterator[tuple[nn.Module, Callable[[], Any]]]:
        """As `drawing`, before muP."""
        scale = sum(1 + (block.ffn is not None) for block in self.blocks) ** -0.5
        yield self.embedding, partial(_draw_embedding, self.embedding)
        for block in cast(Iterable[Block], self.layers.values()):
            yield block, partial(block.reset_parameters, scale)
        yield self.norm, self.norm.reset_parameters
        if self.head is not None:
            yield self.head, partial(_draw_embedding, self.head)
        for module in self._heads:
            yield module, partial(module.reset_parameters, scale)

    def _drawn(self, part: nn.Module, draw: Callable[[], Any]) -> None:
        """Draw a part's weights; muP has some of them start smaller."""
        draw()
        own = set(part.modules())
        for name, layer in self.named_modules() if self.mup.scales else ():
            start = self.mup.of(f"{name}.weight").start
            if start != 1 and layer in own:
                layer.get_parameter("weight").mul_(start)

    def _placed(self, tokens: Tensor, segments: Segments | None, training: bool = False) -> Segments:
        """The segments of whole sequences. Raises ValueError for sequences longer than the stack can hold."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ValueError(
                "torch.jit.trace makes constants of lengths; use torch.export.export(stack, (tokens,)), which does not"
            )
        self.check_length(tokens.shape[1], training)
        if segments is None:
            return Segments.dense(tokens.shape[1], device=tokens.device)
        start = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        return segments.placed(start, tokens.shape[1], 0)

    def _sequence(
        self,
        tokens: Tensor,
        segments: Segments,
        form: Callable[[Block, Tensor, Segments], tuple[Tensor, Routing | None]],
    ) -> tuple[Tensor, dict[int, Routing]]:
        """The residual stream after the last layer, and how each mixture of experts routed."""
        x, routings = self._embedded(tokens), {}
        for index, block in enumerate(self.blocks):
            x, routing = form(block, x, segments)
            if routing is not None:
                routings[index] = routing
        return x, routings

    def _embedded(self, tokens: Tensor) -> Tensor:
        scale, x = self.spec.embedding.scale, cast(Tensor, self.embedding(tokens))
        return x if scale == 1 else x * scale

    def _step(
        self,
        tokens: Tensor,
        state: StackState,
        segments: Segments | None,
        form: Callable[[Block, Tensor, LayerState, Segments], tuple[Tensor, LayerState]],
        at: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        if tokens.shape[1] == 0:
            return self._logits(self._embedded(tokens)), state
        x, after = self._walked(tokens, state, segments, form)
        return self._logits(x if at is None else x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))), after

    def _walked(
        self,
        tokens: Tensor,
        state: StackState,
        segments: Segments | None,
        form: Callable[[Block, Tensor, LayerState, Segments], tuple[Tensor, LayerState]],
    ) -> tuple[Tensor, StackState]:
        """The residual stream after the last layer, and the state after the last token."""
        placed = (segments or Segments()).placed(state.length, tokens.shape[1], state.bound)
        bound = self.room(state, placed, tokens.shape[1])
        x, layers = self._embedded(tokens), []
        for block, before in zip(self.blocks, state.layers, strict=True):
            x, after = form(block, x, before, placed)
            layers.append(after)
        length = placed.ends(state.length)
        reach = placed.furthest(state.reach, length)
        return x, replace(state, layers=tuple(layers), length=length, reach=reach, bound=bound)

    def room(self, state: StackState, segments: Segments, tokens: int) -> int:
        """The bound after `tokens` more, placed by `segments`; ValueError where the state has no room for them.

        It is looked up exactly where padding might make the difference.
        """
        bound = state.bound + tokens
        if not state.bounded or bound <= state.max_tokens:
            return bound
        longest = segments.position.amax(1).add(1) if segments.position is not None else state.length
        exact = int(torch.maximum(longest, state.length).max()) if state.batch else 0
        if exact > state.max_tokens:
            raise ValueError(
                f"the state has room for {state.max_tokens} tokens, and these reach {exact}; "
                "make it with init_state(batch, max_tokens=...) that holds them"
            )
        return state.max_tokens

    def _logits(self, x: Tensor) -> Tensor:
        return self._score(self.norm(x), self._output())

    def _loss(self, x: Tensor, targets: Tensor, average: Average, with_z: bool = False) -> tuple[Tensor, Tensor]:
        score = partial(self._score, output=self._output())
        return next_token_loss(x, targets, score, self.spec.model.vocab_size, with_z, average)

    def _output(self) -> Callable[[Tensor], Tensor]:
        """The stream [..., D] -> logits, by the weights that stand now: a loss's parts are scored again later."""
        head = self.head
        if head is not None and not is_bare(head):
            return head
        weight, bias = (self.embedding.weight, None) if head is None else (head.weight, head.bias)
        return lambda x: self.linear(x, (weight,), (bias,))

    def _score(self, x: Tensor, output: Callable[[Tensor], Tensor]) -> Tensor:
        cap, shrunk = self.spec.head.logit_softcap, self.mup.shrunk
        logits = output(x if shrunk == 1 else x * shrunk)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _draw_embedding(layer: nn.Embedding | nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=EMBEDDING_STD)


class _Undrawn(TorchFunctionMode):
    """Modules made under it leave their weights undrawn: meta tensors have none, yet PyTorch would take 2 s to draw."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def build(
    spec: StackSpec | str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
) -> Stack:
    """The stack of a spec, or of the file or preset of a name, with freshly drawn weights (none on the meta device).

    dtype: model.dtype by default; decays, dt biases and recurrent states stay at least float32 whatever it is.
    kernels: a provider's name for all operations, or `auto`. Raises ValueError for a provider that cannot serve,
    for optimizer_groups that match no parameter, and for a checkpoint, whose weights would be lost.
    """
    stack = outline(_undrawn_spec(spec), device, dtype, kernels)
    if torch.device(device).type != "meta":
        stack.to_empty(device=device).reset_parameters()
    return stack


def _undrawn_spec(given: StackSpec | str | Path) -> StackSpec:
    spec = spec_of(given)
    if not isinstance(given, StackSpec) and (expand_home(given) / "spec.yml").is_file():
        place = str(given)
        raise ValueError(
            f"{place} is a checkpoint, and build draws fresh weights: write load_checkpoint({place!r}) for the trained "
            f"ones, or build(load({place!r}))"
        )
    return spec


def outline(
    spec: StackSpec,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
) -> Stack:
    """The stack as `build` makes it for a device, but still on the meta device: without memory for its weights."""
    dtype = DTYPES[spec.model.dtype] if dtype is None else dtype
    if dtype not in (*DTYPES.values(), torch.float64):
        raise ValueError(f"dtype = {dtype!r}: give torch.float32, torch.bfloat16, torch.float16 or torch.float64")
    check_name(kernels)
    with torch.device("meta"), _Undrawn():
        stack = Stack(spec, Target(kernels, torch.device(device).type, dtype))
    check_groups([name for name, _ in stack.named_parameters()], spec.training_hints.optimizer_groups)
    stack.to(dtype)
    return stack
