"""Ways of generating, and the one reference that all are held to: the whole text computed anew."""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import eulerstack as es
from eulerstack.inference import generate as module
from eulerstack.inference.engine import Engine, Request
from eulerstack.inference.sampling import Token
from eulerstack.inference.tape import Tape

LOGITS, SURE = 1e-4, 1e-3
"""How far logits may be off, of the largest; how far the two best must lie apart for a greedy token to be certain."""


@dataclass
class Written:
    """What a way made of a prompt: `tokens`, and the logits (or log probabilities) [n, V] that each was chosen by."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor


Way = Callable[[es.Stack, list[list[int]], int], Iterator[Written]]


def recomputed(model: es.Stack, prompt: list[int], tokens: list[int]) -> Tensor:
    """The logits [n, V] that the model chooses `tokens` by, no state involved."""
    with torch.inference_mode():
        return model.parallel(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]


def check(model: es.Stack, got: Written, greedy: bool = True) -> None:
    """Raises AssertionError unless the logits are the reference's and the tokens the best wherever that is certain.

    The reference is given the way's own tokens, so that one choice between equals does not end the comparison.
    """
    if not got.tokens:
        return
    wanted = recomputed(model, got.prompt, got.tokens)
    assert got.logits.shape == wanted.shape
    error = (got.logits.log_softmax(-1) - wanted.log_softmax(-1)).abs().amax(-1) / wanted.abs().max()
    allowed = torch.full_like(error, LOGITS)
    if bool((error > LOGITS).any()):
        allowed = allowed.maximum(10 * rounding(model, got, wanted))
    assert bool((error <= allowed).all()), f"{error.tolist()} of the largest logit, not {allowed.tolist()}"
    if greedy:
        best = wanted.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > SURE
        assert torch.equal(torch.tensor(got.tokens)[sure], best.indices[:, 0][sure])


def rounding(model: es.Stack, got: Written, wanted: Tensor) -> Tensor:
    """[n]: how far the reference itself is off float64's, of the largest logit.

    A group norm of a sum that nearly cancels, drawn once in a thousand stacks, makes much of little.
    """
    exact = es.build(model.spec, dtype=torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    true = recomputed(exact, got.prompt, got.tokens)
    return ((wanted.log_softmax(-1) - true.log_softmax(-1)).abs().amax(-1) / true.abs().max()).to(wanted.dtype)


def distribution(tokens: list[Token], vocab: int) -> Tensor:
    """The log probabilities [n, V] that tokens tell when all are asked for."""
    return torch.tensor([[token.top[i] for i in range(vocab)] for token in tokens]).reshape(-1, vocab)


def generated(model: es.Stack, prompts: list[list[int]], count: int, **options: Any) -> Iterator[Written]:
    """`es.generate`."""
    vocab = model.spec.model.vocab_size
    steps = list(es.generate(model, prompts, count, temperature=0, logprobs=vocab, **options))
    for prompt, tokens in zip(prompts, zip(*steps, strict=True), strict=True):
        yield Written(prompt, [int(token) for token in tokens], distribution(list(tokens), vocab))


def goes_on(
    model: es.Stack, prompts: list[list[int]], count: int, logits: Tensor, state: es.StackState
) -> Iterator[Written]:
    """Greedy steps from a state whose rows have read the prompts; logits [B, V] are what they end in."""
    tokens, seen = [logits.argmax(-1)], [logits]
    for _ in range(count - 1):
        out, state = model.recurrent(tokens[-1][:, None], state)
        seen.append(out[:, -1])
        tokens.append(out[:, -1].argmax(-1))
    for row, prompt in enumerate(prompts):
        yield Written(prompt, [int(step[row]) for step in tokens], torch.stack([step[row] for step in seen]))


def alone(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    for prompt in prompts:
        yield from generated(model, [prompt], count)


def chunked(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """Prompts longer than the chunk that is read at once, in a ragged batch and alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PREFILL", 7)
        yield from generated(model, prompts, count)
        yield from generated(model, prompts[:1], count)


def left_padded(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """In two calls, both padded on the left."""
    state = model.init_state(len(prompts), max(map(len, prompts)) + count)
    for part in ([p[: len(p) // 2] for p in prompts], [p[len(p) // 2 :] for p in prompts]):
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], dtype=torch.int64)
        real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in part], dtype=torch.bool)
        logits, state = model.chunkwise(ids, state, es.Segments(real=real))
    yield from goes_on(model, prompts, count, logits[:, -1], state)


def in_pieces(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """Read in calls of one token and of several, in turn."""
    dice = random.Random(0)
    for prompt in prompts:
        state, at = model.init_state(1, len(prompt) + count), 0
        while at < len(prompt):
            part = torch.tensor([prompt[at : at + dice.choice([1, 1, 2, 3, 11])]])
            form = model.recurrent if part.shape[1] == 1 else model.chunkwise
            logits, state = form(part, state)
            at += part.shape[1]
        yield from goes_on(model, [prompt], count, logits[:, -1], state)


def forked(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """Rows copied many times, each going its own way; the rows they came from go on after them."""
    logits, state = module.prefill(model, prompts, count + 1)
    rows = [row for row in reversed(range(len(prompts))) for _ in range(2)]
    first = [(7 * i) % model.spec.model.vocab_size for i in range(len(rows))]
    out, fork = model.recurrent(torch.tensor(first)[:, None], state.select(rows))
    ways = [[*prompts[row], token] for row, token in zip(rows, first, strict=True)]
    yield from goes_on(model, ways, count, out[:, -1], fork)
    yield from goes_on(model, prompts, count, logits, state)


def rolled_back(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """A ragged batch whose rows take some tokens too many, each as many as it likes, and go back."""
    tape = Tape(model, model.init_state(len(prompts), max(map(len, prompts)) + count + 6, rollback=12), every=4, keep=3)
    lengths = [len(prompt) for prompt in prompts]
    logits = tape.chunkwise(*ragged(prompts))[range(len(prompts)), [length - 1 for length in lengths]]
    beyond = [[7 * row] * (row % 3 * 2 + 1) for row in range(len(prompts))]
    tape.chunkwise(*ragged(beyond))
    tape.recurrent(torch.tensor([[3]] * len(prompts)))
    tape.rollback(torch.tensor([len(more) + 1 for more in beyond]))
    assert tape.state.length.tolist() == lengths
    yield from goes_on(model, prompts, count, logits, tape.state)


def ragged(rows: list[list[int]]) -> tuple[Tensor, es.Segments]:
    """Rows of any lengths, padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, es.Segments(real=torch.tensor([[i < len(row) for i in range(longest)] for row in rows]))


def guessed(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """With a draft of the same mixers and a little other weights, so that some of its guesses are kept."""
    draft = deepcopy(model)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.mul_(1 + 0.03 * torch.randn(weight.shape, generator=noise).to(weight))
    yield from generated(model, prompts, count, draft=draft, ahead=3)


def restored(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """After a snapshot, a token that was not to be, and the snapshot again: first copies of single rows, then all."""
    logits, state = module.prefill(model, prompts, count)
    kept = state.snapshot()
    _, state = model.recurrent(torch.tensor([[3]] * len(prompts)), state)
    state = state.restore(kept)
    for row, prompt in enumerate(prompts):
        yield from goes_on(model, [prompt], count, logits[row : row + 1], state.select([row]))
    yield from goes_on(model, prompts, count, logits, state)


def served(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """Through an engine of fewer slots than requests, some of them cancelled, the prompts longer than a chunk."""
    engine = Engine(model, slots=2, max_tokens=max(map(len, prompts)) + count, prefill=9)
    requests = [asked(engine, prompt, count) for prompt in [*prompts, *prompts]]
    for step in range(1000):
        if engine.idle:
            break
        engine.step()
        if step % 7 == 3 and (unlucky := step // 7 % len(requests)):  # never the first
            engine.cancel(requests[unlucky])
        if step in (5, 20):
            requests += [asked(engine, prompt, count) for prompt in prompts]
    assert engine.idle and requests[0].finished == "length"
    yield from map(answer, requests)


def remembered(model: es.Stack, prompts: list[list[int]], count: int) -> Iterator[Written]:
    """Through an engine's store of prefixes: prompts that were read before, and longer ones that begin like them."""
    engine = Engine(model, slots=2, max_tokens=max(map(len, prompts)) + count + 3, prefill=4, prefix_bytes=1 << 30)
    requests: list[Request] = []
    for again in (prompts, prompts, [[*prompt, 7, 7, 7] for prompt in prompts]):
        requests += [asked(engine, prompt, count) for prompt in again]
        while not engine.idle:
            engine.step()
    assert engine.prefixes is not None and engine.prefixes.hits >= 2 * sum(len(prompt) > 4 for prompt in prompts)
    yield from map(answer, requests)


def asked(engine: Engine, prompt: list[int], count: int, **rules: object) -> Request:
    """A request that tells all log probabilities."""
    vocab = engine.model.spec.model.vocab_size
    return engine.submit(prompt, count, **{"temperature": 0, **rules}, logprobs=vocab)


def answer(request: Request) -> Written:
    vocab = request.rules.logprobs
    assert vocab is not None
    return Written(request.prompt, list(map(int, request.tokens)), distribution(request.tokens, vocab))  # type: ignore[arg-type]


WAYS: dict[str, Way] = {
    "alone": alone,
    "ragged": generated,
    "chunked": chunked,
    "left padded": left_padded,
    "in pieces": in_pieces,
    "forked": forked,
    "rolled back": rolled_back,
    "restored": restored,
    "guessed": guessed,
    "served": served,
    "remembered": remembered,
}
