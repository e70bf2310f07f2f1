"""Prompts that begin alike are read once: what reading left behind, in a radix tree over token ids."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ..state import StackState

ALPHA = 1.0
"""Weight of the FLOPs saved a byte against recency, each from 0 to 1 among the candidates."""


class Copies:
    """Copies of tensors in memory of their own, nbytes of it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        self.nbytes = sum(t.nbytes for t in self.tensors.values())

    def into(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensors[name].copy_(tensor)


@dataclass(eq=False)
class Node:
    """A chunk of tokens under its parent, and what a row held after it.

    span: the chunk's slots of what is indexed by position. rest: everything else at the chunk's end; None once it was
    dropped, while nodes below still need the span.
    """

    parent: "Node | None"
    key: bytes
    end: int
    span: Copies
    rest: Copies | None
    used: int = 0
    children: dict[bytes, "Node"] = field(default_factory=dict)


class PrefixStore:
    """States of prompts read in chunks that begin at multiples of `grid`, kept where those chunks end.

    Nothing else is stored, so that what follows a hit equals to the bit what follows reading. Nodes hold copies: no
    row is shared.

    bytes: of all tensors kept, never more than `budget`. hits: times that a prompt went on from something stored.
    tokens_reused: how many tokens it did not have to read. evictions: states that had to go.
    """

    def __init__(self, budget: int, grid: int, flops: Callable[[int], int]) -> None:
        """budget: in bytes. flops: of reading so many tokens, as `Stack.flops` counts them."""
        if budget < 1 or grid < 1:
            raise ValueError(f"budget = {budget} bytes or grid = {grid} tokens is too small: give 1 or more")
        self.budget, self.grid, self.flops = budget, grid, cache(flops)
        self.root = Node(None, b"", 0, Copies({}), Copies({}))
        self.bytes = self.hits = self.tokens_reused = self.evictions = self._clock = 0

    def clear(self) -> None:
        """Forget all states; the counters go on."""
        self.root, self.bytes = Node(None, b"", 0, Copies({}), Copies({})), 0

    def find(self, tokens: Sequence[int]) -> int:
        """The longest stored prefix that leaves a token to read."""
        return self._deepest(tokens)[-1].end

    def fill(self, tokens: Sequence[int], row: StackState, read: int = 0) -> int:
        """Bring a state of one row, which has read so many of these tokens, to the longest stored prefix.

        Written into the row's own memory; returns how many tokens it has read then.
        """
        path = self._deepest(tokens)
        last = path[-1]
        if last.end <= read or last.rest is None:
            return read
        for node in path[1:]:
            if node.end > read:
                node.span.into(row.span(node.end - self.grid, node.end))
        last.rest.into(row.rest())
        row.length.fill_(last.end)
        row.reach.fill_(last.end)
        self._use(last)
        self.hits += 1
        self.tokens_reused += last.end - read
        return last.end

    def add(self, tokens: Sequence[int], row: StackState) -> None:
        """Keep a copy of a row that has read these tokens, whole chunks, and nothing else.

        Chunks on the way that are not there, or no longer, come from the row as well. Nothing is stored where all of
        them together do not fit the budget.
        """
        keys = self._keys(tokens, len(tokens) // self.grid)
        path = self._walk(keys)
        last = path[-1]
        if last.end < len(tokens) or last.rest is None:
            more = sum(t.nbytes for part in (row.span(last.end, len(tokens)), row.rest()) for t in part.values())
            if not self._make_room(more, path):
                return
            rest, ends = Copies(row.rest()), range(last.end + self.grid, len(tokens) + 1, self.grid)
            spans = [Copies(row.span(end - self.grid, end)) for end in ends]
            for key, end, span in zip(keys[len(path) - 1 :], ends, spans, strict=True):
                node = Node(last, key, end, span, None)
                last.children[key] = node
                last = node
            last.rest = rest
            self.bytes += more
        self._use(last)

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents before their children."""
        left = list(self.root.children.values())
        while left:
            node = left.pop()
            left.extend(node.children.values())
            yield node

    def _deepest(self, tokens: Sequence[int]) -> list[Node]:
        """The way from the root to the last node before the last token whose state is whole."""
        path = self._walk(self._keys(tokens, (len(tokens) - 1) // self.grid))
        while path[-1].rest is None:
            path.pop()
        return path

    def _walk(self, keys: list[bytes]) -> list[Node]:
        """The root, and a node a chunk as far as they are there."""
        path = [self.root]
        for key in keys:
            if key not in path[-1].children:
                break
            path.append(path[-1].children[key])
        return path

    def _keys(self, tokens: Sequence[int], chunks: int) -> list[bytes]:
        ids = array("q", tokens[: chunks * self.grid])
        return [ids[start : start + self.grid].tobytes() for start in range(0, len(ids), self.grid)]

    def _use(self, node: Node) -> None:
        self._clock += 1
        node.used = self._clock

    def _make_room(self, more: int, path: list[Node]) -> bool:
        """Evict until `more` bytes fit under the last node of a path, whose spans stay; False where they cannot."""
        if more + sum(node.span.nbytes for node in path) > self.budget:
            return False
        while self.bytes + more > self.budget:
            self._evict(self._victim(path[-1]), path[-1])
        return True

    def _victim(self, last: Node) -> Node:
        """The state worth least: recency + alpha * FLOPs saved a byte (Marconi, Pan et al. 2024, arXiv 2411.19379).

        As there, a node of several children keeps its state: where prompts branched, others may. `last` is about to
        have a child more.
        """
        freed = {node: size for node in self.nodes() if (size := self._freed(node, last))}
        saved = {node: self._saved(node) / size for node, size in freed.items()}
        most, oldest = max(saved.values()), min(node.used for node in freed)
        ages = max(1, self._clock - oldest)
        return min(freed, key=lambda node: (node.used - oldest) / ages + ALPHA * saved[node] / most)

    def _saved(self, node: Node) -> int:
        """FLOPs of reading from the nearest state above a node to it."""
        above = node.parent
        while above is not None and above.rest is None:
            above = above.parent
        return self.flops(node.end) - (self.flops(above.end) if above else 0)

    def _freed(self, node: Node, last: Node) -> int:
        """Bytes that evicting a node's state frees; 0 where it has none, or keeps it."""
        if node.rest is None or len(node.children) + (node is last) > 1:
            return 0
        return node.rest.nbytes + sum(gone.span.nbytes for gone in self._useless(node, last))

    def _useless(self, node: Node, last: Node) -> list[Node]:
        """The nodes that lead nowhere without a node's state: itself, a leaf, and those above that lead only to it."""
        gone = [] if node.children or node is last else [node]
        while gone:
            above = gone[-1].parent
            if above is None or above is last or above.rest is not None or len(above.children) > 1:
                break
            gone.append(above)
        return gone

    def _evict(self, node: Node, last: Node) -> None:
        gone = self._useless(node, last)
        self.bytes -= self._freed(node, last)
        self.evictions += 1
        node.rest = None
        if gone and (above := gone[-1].parent):
            del above.children[gone[-1].key]
