"""Continuous batching: requests join and leave a batch of fixed slots between one step and the next."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..model import Stack
from ..state import Saved, StackState
from .generate import check_prompts, stop_ids, token_rows
from .prefix import PrefixStore
from .sampling import Sampler, Sampling, Token, told
from .sessions import Sessions
from .steps import Steps
from .weights import WeightsWatch

CHUNK = 128
"""Tokens of a prompt that are read at once: as long others wait for their next, and so finely are prefixes shared.

A prompt alone is read a fifth to two fifths faster in the chunks of `generate`.
"""


@dataclass(eq=False)
class Request:
    """A prompt to go on from. `tokens` grows with the steps until `finished` says why no more will come.

    scores: with `echo`, the prompt's tokens as the model saw them coming; not the first, where nothing comes before it.
    session: the conversation that it is a turn of. text: all that was said before, and the prompt; its state has read
    `read` tokens of it. parked: the state to go on from, until it is in a slot. unparked: why the last one is not on
    the disk. mixed: whether weights were changed while it was under way, so that nobody may share what it read.
    """

    prompt: list[int]
    max_new_tokens: int
    rules: Sampling
    stop: frozenset[int]
    echo: bool = False
    tokens: list[int] = field(default_factory=list)
    scores: list[Token] = field(default_factory=list)
    finished: str | None = None
    session: str | None = None
    text: list[int] = field(default_factory=list)
    read: int = 0
    parked: Saved | None = None
    unparked: OSError | None = None
    mixed: bool = False

    @property
    def opens(self) -> bool:
        """Whether nothing was said before the prompt."""
        return len(self.text) == len(self.prompt)

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
    with `echo` it is read, for its scores. Where weights were changed (see WeightsWatch), the store is emptied before
    the next request begins; requests that are under way end with what they have read. A turn of a session goes on from
    the state in which the last one was parked; chunks still end at multiples of `prefill`.
    """

    def __init__(
        self,
        model: Stack,
        slots: int = 8,
        max_tokens: int | None = None,
        budget: int | None = None,
        prefill: int = CHUNK,
        prefix_bytes: int | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        """`budget`: bytes that the slots' states may take; fewer slots are made where it does not hold them all.

        `prefill`: tokens of a chunk. `prefix_bytes`: what the store of prefixes may take beside the slots; none
        by default. Prompts share whole chunks. `sessions`: where conversations are parked.
        """
        if slots < 1 or prefill < 1:
            raise ValueError(f"slots = {slots} or prefill = {prefill} is too small: give 1 or more")
        self.model, self.prefill, self.sessions = model, prefill, sessions
        self.fresh = model.init_state(1, max_tokens)
        each = self.fresh.nbytes()
        self.slots = slots if budget is None or not each else min(slots, budget // each)
        if self.slots < 1:
            raise ValueError(f"budget = {budget} bytes do not hold one slot of {each}: raise it, or lower max_tokens")
        self.state = model.init_state(self.slots, max_tokens)
        self.one_more = Steps(model)
        device = model.embedding.weight.device
        self.sampler = Sampler(self.slots, model.spec.model.vocab_size, device)
        self.prefixes = None if prefix_bytes is None else PrefixStore(prefix_bytes, prefill, model.flops)
        self.weights = WeightsWatch(model)
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
        session: str | None = None,
        **rules: Any,
    ) -> Request:
        """Queue a prompt; rules are Sampling's. Raises ValueError for what can never be served.

        `session`: the id of a conversation. The prompt goes on from what is parked under it, and what the request ends
        with is parked there, unless it is cancelled.
        """
        rows = token_rows(prompt)
        if len(rows) > 1:
            raise ValueError(f"{len(rows)} prompts are given: submit each of them")
        check_prompts(self.model, rows, max_new_tokens)
        request = Request(rows[0], max_new_tokens, Sampling(**rules), stop_ids(stop), echo, session=session)
        before, request.parked = self._before(session)
        request.text = [*before, *rows[0]]
        if self.state.bounded and len(request.text) + max_new_tokens > self.state.max_tokens:
            raise ValueError(
                f"{len(request.text)} tokens of prompt and max_new_tokens = {max_new_tokens} are more than the "
                f"{self.state.max_tokens} tokens of a slot; shorten them, or raise max_tokens"
            )
        self.waiting.append(request)
        return request

    def _before(self, session: str | None) -> tuple[list[int], Saved | None]:
        """What was said in a session, and the state of it; raises ValueError where no turn can follow now."""
        if session is None:
            return [], None
        if self.sessions is None:
            raise ValueError(f"session = {session!r} has no place: make the engine with sessions=Sessions(...)")
        if any(request.session == session for request in (*self.waiting, *self.active.values())):
            raise ValueError(f"session = {session!r} has a request that has not ended: wait for it, or cancel it")
        if session not in self.sessions:
            return [], None
        tokens, parked = self.sessions.open(session)
        parked.fitted(self.fresh)
        return tokens, parked

    @torch.inference_mode()  # as the steps: what they made may not be written to outside it
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
        begins = bool(self.waiting) and len(self.active) < self.slots  # a full engine does not look at its weights
        if self.prefixes is not None and begins and self.weights.changed():
            self.prefixes.clear()
            for request in self.active.values():
                request.mixed = True
        for slot in range(self.slots):
            if slot not in self.active and self.waiting:
                request = self.waiting.popleft()
                self.active[slot] = request
                self.reading.append(slot)
                self.state = self.state.put([slot], self.fresh)
                if request.parked is not None:
                    request.read, request.parked = request.parked.into(self._row(slot)).bound, None
                self.sampler.put(slot, request.rules, request.text)

    def _read_chunk(self) -> list[Request]:
        """The next chunk of the prompt whose turn it is; its first token if that was the last chunk."""
        slot = self.reading.popleft()
        request = self.active[slot]
        shares = self.prefixes is not None and request.opens and not request.mixed
        if self.prefixes is not None and shares and not request.echo:
            request.read = self.prefixes.fill(request.text, self._row(slot), request.read)
        end = min(len(request.text), (request.read // self.prefill + 1) * self.prefill)
        part = self._ids([request.text[request.read : end]])
        at = None if request.echo else self._ids([[part.shape[1] - 1]])
        logits, row = self.model.chunkwise(part, replace(self._row(slot), bound=request.read), at=at)
        self.state = self.state.put([slot], row)
        if self.prefixes is not None and shares and end % self.prefill == 0:
            self.prefixes.add(request.text[:end], row)
        if request.echo:
            self._score(request, logits[0])
        request.read = end
        if end < len(request.text):
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
        all_real = len(rows) == self.slots
        logits, self.state = self.one_more(self._ids(ids), replace(self.state, bound=bound), None if all_real else real)
        requests = [self.active[slot] for slot in rows]
        for request, token in zip(requests, self.sampler(logits[rows], rows), strict=True):
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
                if why != "cancelled":
                    self._park(slot, request)
                del self.active[slot]
                self.sampler.put(slot, Sampling(temperature=0))
                if slot in self.reading:
                    self.reading.remove(slot)

    def _park(self, slot: int, request: Request) -> None:
        """Keep what a turn ends with; its last token was not read, and is the first that the next turn reads."""
        if self.sessions is None or request.session is None:
            return
        try:
            self.sessions.park(request.session, self._row(slot), [*request.text, *request.tokens])
        except OSError as error:  # a full disk ends no one else's answer
            request.unparked = error

    def _score(self, request: Request, logits: Tensor) -> None:
        """How likely the model found each token of the prompt that follows one of this chunk [T, V]."""
        scores, count = logits.float().log_softmax(-1), request.rules.logprobs or 0
        skip = max(0, len(request.text) - len(request.prompt) - request.read - 1)  # of what was said before
        for token, row in zip(request.text[request.read + 1 + skip :], scores[skip:], strict=False):
            request.scores.append(told(token, row, count))

    def _row(self, slot: int) -> StackState:
        """A slot's state, in place."""
        return self.state.map(lambda t: t[slot : slot + 1])

    def _ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.sampler.device)
