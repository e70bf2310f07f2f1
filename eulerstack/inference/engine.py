"""Continuous batching: requests join and leave a batch of fixed slots between one step and the next."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..model import Stack
from ..segments import Segments
from ..state import StackState
from .generate import PREFILL, check_prompts
from .prefix import PrefixStore
from .sampling import Sampler, Sampling, Token, told


@dataclass(eq=False)
class Request:
    """A prompt to go on from. `tokens` grows with the steps until `finished` says why no more will come.

    scores: with `echo`, the prompt's tokens as the model saw them coming, the first of them with nothing before it.
    """

    prompt: list[int]
    max_new_tokens: int
    rules: Sampling
    stop: frozenset[int]
    echo: bool = False
    tokens: list[int] = field(default_factory=list)
    scores: list[Token] = field(default_factory=list)
    finished: str | None = None
    read: int = 0

    @property
    def length(self) -> int:
        """Tokens that its state has seen."""
        return self.read + max(0, len(self.tokens) - 1)


class Engine:
    """Serves many requests at once through one state of `slots` rows.

    A step reads one chunk of one prompt and adds a token to every request that is past its prompt, so that neither
    waits for the other. Prompts are read alone, in chunks that begin at multiples of `prefill`, and steps always have
    all slots: what a request gets does not depend on the others (its slot's place may round differently). A prompt
    that begins like an earlier one goes on from what the store `prefixes` kept of it, to the bit as if it were read;
    with `echo` it is read, for its scores.
    """

    def __init__(
        self,
        model: Stack,
        slots: int = 8,
        max_tokens: int | None = None,
        budget: int | None = None,
        prefill: int = PREFILL,
        prefix_bytes: int | None = None,
    ) -> None:
        """`budget`: bytes that the slots' states may take; fewer slots are made where it does not hold them all.

        `prefix_bytes`: those that the store of prefixes may take beside them; there is none by default.
        """
        if slots < 1 or prefill < 1:
            raise ValueError(f"slots = {slots} or prefill = {prefill} is too small: give 1 or more")
        self.model, self.prefill = model, prefill
        self.fresh = model.init_state(1, max_tokens)
        each = self.fresh.nbytes()
        self.slots = slots if budget is None or not each else min(slots, budget // each)
        if self.slots < 1:
            raise ValueError(f"budget = {budget} bytes do not hold one slot of {each}: raise it, or lower max_tokens")
        self.state = model.init_state(self.slots, max_tokens)
        device = model.embedding.weight.device
        self.sampler = Sampler(self.slots, model.spec.model.vocab_size, device)
        self.prefixes = None if prefix_bytes is None else PrefixStore(prefix_bytes, prefill, model.flops)
        self.waiting: deque[Request] = deque()
        self.reading: deque[int] = deque()
        self.active: dict[int, Request] = {}

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 128,
        *,
        stop: Collection[int] = (),
        echo: bool = False,
        **rules: Any,
    ) -> Request:
        """Queue a prompt; rules are Sampling's. Raises ValueError for what can never be served."""
        check_prompts(self.model, [list(prompt)], max_new_tokens)
        if self.state.bounded and len(prompt) + max_new_tokens > self.state.max_tokens:
            raise ValueError(
                f"{len(prompt)} tokens of prompt and max_new_tokens = {max_new_tokens} are more than the "
                f"{self.state.max_tokens} tokens of a slot; shorten them, or raise max_tokens"
            )
        request = Request(list(prompt), max_new_tokens, Sampling(**rules), frozenset(stop), echo)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """No more tokens for it; its slot is free for the next."""
        if request.finished is None:
            self._finish(request, "cancelled")

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.active

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """The requests that got a token."""
        self._admit()
        got = self._decode() if len(self.active) > len(self.reading) else []
        return got + self._read_chunk() if self.reading else got

    def _admit(self) -> None:
        """Whoever came first takes each free slot."""
        for slot in range(self.slots):
            if slot not in self.active and self.waiting:
                request = self.waiting.popleft()
                self.active[slot] = request
                self.reading.append(slot)
                self.state = self.state.put([slot], self.fresh)
                if self.prefixes is not None and not request.echo:
                    request.read = self.prefixes.fill(request.prompt, self._row(slot))
                self.sampler.put(slot, request.rules, request.prompt)

    def _read_chunk(self) -> list[Request]:
        """The next chunk of the prompt whose turn it is; its first token if that was the last chunk."""
        slot = self.reading.popleft()
        request = self.active[slot]
        end = min(len(request.prompt), (request.read // self.prefill + 1) * self.prefill)
        part = self._ids([request.prompt[request.read : end]])
        logits, row = self.model.chunkwise(part, replace(self._row(slot), bound=request.read))
        self.state = self.state.put([slot], row)
        if self.prefixes is not None and end % self.prefill == 0:
            self.prefixes.add(request.prompt[:end], row)
        if request.echo:
            self._score(request, logits[0])
        request.read = end
        if end < len(request.prompt):
            self.reading.append(slot)
            return []
        self._take(request, self.sampler(logits[:, -1], [slot])[0])
        return [request]

    def _decode(self) -> list[Request]:
        """One token more for every request that is past its prompt."""
        rows = [slot for slot in sorted(self.active) if slot not in self.reading]
        ids = [[0]] * self.slots
        for slot in rows:
            ids[slot] = [self.active[slot].tokens[-1]]
        real = torch.zeros(self.slots, 1, dtype=torch.bool, device=self.sampler.device)
        real[rows] = True
        bound = max(request.length for request in self.active.values())
        segments = None if len(rows) == self.slots else Segments(real=real)
        logits, self.state = self.model.recurrent(self._ids(ids), replace(self.state, bound=bound), segments)
        requests = [self.active[slot] for slot in rows]
        for request, token in zip(requests, self.sampler(logits[rows, -1], rows), strict=True):
            self._take(request, token)
        return requests

    def _take(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        if token in request.stop:
            self._finish(request, "stop")
        elif len(request.tokens) == request.max_new_tokens:
            self._finish(request, "length")

    def _finish(self, request: Request, why: str) -> None:
        request.finished = why
        if request in self.waiting:
            self.waiting.remove(request)
        for slot, owner in list(self.active.items()):
            if owner is request:
                del self.active[slot]
                self.sampler.put(slot, Sampling(temperature=0))
                if slot in self.reading:
                    self.reading.remove(slot)

    def _score(self, request: Request, logits: Tensor) -> None:
        """How likely the model found each token of the prompt that follows one of this chunk [T, V]."""
        scores, count = logits.float().log_softmax(-1), request.rules.logprobs or 0
        for token, row in zip(request.prompt[request.read + 1 :], scores, strict=False):
            request.scores.append(told(token, row, count))

    def _row(self, slot: int) -> StackState:
        """A slot's state, in place."""
        return self.state.map(lambda t: t[slot : slot + 1])

    def _ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.sampler.device)
