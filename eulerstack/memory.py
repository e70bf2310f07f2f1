"""What a training step holds in memory, counted: layers run forward and backward on tensors without numbers.

The tensors of a `FakeTensorMode` have shapes, dtypes and a device, and no memory; every storage that an operation would
allocate is noted when it comes and when it goes. So the figures follow the code that trains. What an operation
allocates inside itself is not seen.
"""

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from fractions import Fraction
from itertools import accumulate
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .block import Block
from .groups import to_muon
from .model import Stack, build
from .segments import Segments
from .spec import Checkpointing, LayerSpec, StackSpec, with_hints

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]

LENGTHS = (256, 512, 768)
"""Tokens from which the bytes of a longer layer are drawn out, where Python leads its kernels through the tokens.

The mask of a larger window beside such kernels is not seen: 1.4 % of arch_expert_hymba at 4,096 tokens.
"""

LOOPS = {("selective_scan", "torch"), ("wkv", "torch")}
"""Such kernels: operation, provider."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a training step, which is their sum.

    activations: what the layers keep for the backward. work: what the peak has on top, be it logits and loss or what a
    layer's backward is at.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.work


@dataclass(frozen=True)
class Part:
    """A part of a step: its weights, and bytes on top of what is alive before it.

    kept: after its forward, with its output. forward, backward: the most during each, gradients of weights included.
    products, again: `kept` and `backward` where the products are kept and the rest is computed again.
    """

    weights: int
    output: int
    kept: int
    forward: int
    backward: int
    products: int
    again: int

    def under(self, policy: Checkpointing) -> "Part":
        """As it is checkpointed: by `block` it keeps its output, and runs again beside the gradient that came in."""
        if policy == "selective":
            return replace(self, kept=self.products, backward=self.again)
        if policy == "block":
            return replace(self, kept=self.output, backward=max(self.forward + self.output, self.backward))
        return self


@dataclass(frozen=True)
class Step:
    """The layers of a training step, and the ends around them: embedding, norm, head and loss.

    embedded: bytes of the first layer's input. shared: what the first layer to ask makes for all, phases and masks.
    optimizer: bytes of its state; its step is one kernel and makes nothing more.
    """

    layers: tuple[Part, ...]
    ends: Part
    embedded: int
    shared: int
    optimizer: int

    def memory(self, policy: Checkpointing = "none") -> TrainingMemory:
        """At the peak, with layers checkpointed by `policy`."""
        layers = tuple(layer.under(policy) for layer in self.layers)
        weights = self.ends.weights + sum(layer.weights for layer in layers)
        before = list(accumulate((layer.kept for layer in layers), initial=self.shared + self.embedded))
        gradients = list(accumulate((layer.weights for layer in reversed(layers)), initial=self.ends.weights))
        peak = max(self._peaks(layers, before, gradients[-2::-1], weights))
        work = peak - before[-1] - 2 * weights - self.optimizer
        return TrainingMemory(weights, weights, self.optimizer, before[-1], work)

    def _peaks(self, layers: tuple[Part, ...], before: list[int], gradients: list[int], weights: int) -> Iterator[int]:
        """Of each part's forward and backward.

        `before` a layer's forward so much is kept, before its backward there are so many bytes of gradients. Those of
        the last step are there until the backward starts: Lightning drops them between forward and backward.
        """
        still = weights + self.optimizer
        yield still + weights + before[-1] - self.embedded + self.ends.forward
        yield still + before[-1] - self.embedded + self.ends.backward
        for layer, kept, made in zip(layers, before, gradients, strict=False):
            yield still + weights + kept + layer.forward
            yield still + made + kept + layer.backward


def grown(step: Step, more: Step, times: int) -> Step:
    """`times` the difference of two steps on top of the first: all sizes but the peak grow evenly by the row."""

    def sizes(one: Any, other: Any) -> list[int]:
        return [size + times * (larger - size) for size, larger in zip(one, other, strict=True)]

    def part(one: Part, other: Part) -> Part:
        return Part(*sizes(astuple(one), astuple(other)))

    layers = tuple(map(part, step.layers, more.layers))
    ends = sizes(*((s.embedded, s.shared, s.optimizer) for s in (step, more)))
    return Step(layers, part(step.ends, more.ends), *ends)


def count_step(spec: StackSpec, batch: int, tokens: int, precision: Precision = "32-true", device: str = "cpu") -> Step:
    """A step of the hints' optimizer on `batch` rows of one document of `tokens`, as `fit` takes it.

    The kernels are those that `build` takes for this device type on this machine; a GPU's attention is counted as a
    CPU's, since both keep q, k, v, the output and a number a query. Raises ValueError for more than max_seq_len tokens
    where that is a limit.
    """
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    plain = with_hints(spec, {"checkpointing": "none"})
    stack = build(plain, "meta", dtype, "auto" if device == "cpu" else "torch")
    stack.check_length(tokens, training=True)
    mixed = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if precision == "bf16-mixed" else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive, mixed:
        return _count(stack, batch, tokens, alive)


def _count(stack: Stack, batch: int, tokens: int, alive: "Alive") -> Step:
    """Equal layers are counted once; weights that layers share, with the first of them."""
    optimizer = _optimizer(stack)
    blocks, stack.plan, stack.layers = stack.blocks, (), nn.ModuleDict()
    stack.to_empty(device="cpu")
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    ends = _part(stack, alive, lambda: [stack.losses(ids, ids)[0]])
    known: list[tuple[LayerSpec, Part]] = []
    layers, shared, seen = [], 0, set[Block]()
    for block in blocks:
        layer = replace(block.layer, index=0, weights_of=0, origin="")
        part = next((part for other, part in known if other == layer), None)
        if part is None:
            part, more = _layer(block, stack.embedding, ids, alive)
            known.append((layer, part))
            shared += more
        layers.append(replace(part, weights=0) if block in seen else part)
        seen.add(block)
    return Step(tuple(layers), ends, _bytes(stack.embedding(ids)), shared, optimizer)


def _layer(block: Block, embedding: nn.Module, ids: Tensor, alive: "Alive") -> tuple[Part, int]:
    """A layer, and bytes that it makes for all layers. A long one whose kernels loop over tokens is drawn out."""
    block.to_empty(device="cpu")
    tokens = ids.shape[1]
    if tokens <= LENGTHS[-1] or not any(choice[:2] in LOOPS for choice in block.mixer.choices):
        return _measured(block, embedding(ids), alive)
    parts, shared = zip(*(_measured(block, embedding(ids[:, :n]), alive) for n in LENGTHS), strict=True)
    drawn = (_drawn_out(sizes, tokens) for sizes in zip(*map(astuple, parts), strict=True))
    return Part(*drawn), _drawn_out(shared, tokens)


def _drawn_out(sizes: tuple[int, ...], tokens: int) -> int:
    """Bytes at `tokens` of what has `sizes` at LENGTHS: a parabola, for a mixer beside the loop may have a mask."""
    terms = (
        size * prod(Fraction(tokens - other, length - other) for other in LENGTHS if other != length)
        for size, length in zip(sizes, LENGTHS, strict=True)
    )
    return round(sum(terms))


def _measured(block: Block, x: Tensor, alive: "Alive") -> tuple[Part, int]:
    x, segments = x.detach().requires_grad_(), Segments.dense(x.shape[1])
    before = alive.now
    _outputs(block, x, segments)
    shared = alive.now - before
    block.checkpointing = "selective"
    again = _part(block, alive, lambda: _outputs(block, x, segments))
    block.checkpointing = "none"
    part = _part(block, alive, lambda: _outputs(block, x, segments))
    return replace(part, products=again.kept, again=again.backward), shared


def _optimizer(stack: Stack) -> int:
    """Bytes of the optimizer's state: AdamW keeps two numbers of each weight, Muon one."""
    kind = stack.spec.training_hints.optimizer
    return sum(_bytes(w) * (1 if to_muon(name, w.dim(), kind) else 2) for name, w in stack.named_parameters())


def _outputs(block: Block, x: Tensor, segments: Segments) -> list[Tensor]:
    """What a layer's gradients come from."""
    y, routing = block(x, segments)
    return [y] if routing is None else [y, routing.mass, routing.z]


def _part(module: nn.Module, alive: "Alive", run: Any) -> Part:
    """One forward and backward of the module's weights, which are on the device already."""
    before = alive.mark()
    outputs = run()
    kept, forward = alive.now - before, alive.most - before
    alive.mark()
    with torch.autocast("cpu", enabled=False):  # which a trainer leaves before the backward
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    backward = alive.most - before
    for weight in module.parameters():
        weight.grad = None
    return Part(_weights(module), _bytes(outputs[0]), kept, forward, backward, kept, backward)


def _weights(module: nn.Module) -> int:
    return sum(_bytes(weight) for weight in module.parameters())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Alive(TorchDispatchMode):
    """Bytes of all storages that live `now`, and the `most` there have been since the last mark."""

    sees_our_loops = True  # they make their tensors through PyTorch, here without numbers

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def mark(self) -> int:
        """What lives now; `most` starts anew from it."""
        self.most = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
