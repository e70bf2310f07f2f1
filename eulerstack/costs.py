"""What a stack costs, exactly: it is built on the meta device and counted."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .block import Block
from .model import Stack, build
from .spec import LayerSpec, StackSpec, spec_of


@dataclass(frozen=True)
class LayerCost:
    """One layer's share, weights counted where they are first used. state_bytes: one row of max_seq_len tokens."""

    layer: LayerSpec
    parameters: int
    flops_per_token: float
    state_bytes: dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """Parameters, forward FLOPs and state bytes of a stack.

    Shared parameters count once; active ones are those that a token uses at inference.
    """

    stack: Stack
    parameters: int
    active_parameters: int
    layers: tuple[LayerCost, ...]

    @property
    def weight_bytes(self) -> int:
        """Of the weights in the model's dtype, with what stays float32 in it."""
        return sum(p.numel() * p.element_size() for p in self.stack.parameters())

    def flops(self, tokens: int) -> int:
        """Forward FLOPs of one sequence of `tokens`; training costs about three times that."""
        return self.stack.flops(tokens)

    def state_bytes(self, batch: int, tokens: int) -> dict[str, int]:
        """Bytes of a state for `batch` rows of `tokens`, by kind (KV, retention, SSM, conv) and in `total`."""
        self.stack.check_length(tokens)
        kinds: Counter[str] = Counter()
        for block in self.stack.blocks:
            kinds.update(_state_bytes(block, batch, tokens))
        return {**kinds, "total": sum(kinds.values())}


def estimate(spec: StackSpec | str | Path) -> Estimate:
    """Count a stack without its memory: a spec's, or that of what `load` reads under a name.

    A template that keeps no state counts no state bytes.
    """
    stack = build(spec_of(spec), device="meta")
    count = sum(p.numel() for p in stack.parameters())
    idle = sum(block.idle_parameters for block in set(stack.blocks)) + _count(stack.ahead)
    layers = tuple(_layer_cost(stack, index) for index in range(len(stack.blocks)))
    return Estimate(stack, count, count - idle, layers)


def _layer_cost(stack: Stack, index: int) -> LayerCost:
    layer, block, tokens = stack.plan[index], stack.blocks[index], stack.spec.model.max_seq_len
    count = _count(block) if layer.weights_of == index else 0
    return LayerCost(layer, count, block.flops(tokens) / tokens, _state_bytes(block, 1, tokens))


def _state_bytes(block: Block, batch: int, tokens: int) -> dict[str, int]:
    """What the layer keeps; nothing where its template says so."""
    return block.mixer.init_state(batch, tokens).bytes_by_kind() if block.layer.state.kept else {}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
