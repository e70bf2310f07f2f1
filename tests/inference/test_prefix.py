"""The prefix store: a run that goes on from what another prompt left equals to the bit one that reads everything."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import eulerstack as es
from eulerstack.inference.engine import Engine, Request
from eulerstack.inference.prefix import ALPHA, Node, PrefixStore
from eulerstack.state import KVState, LayerState, RetentionState, StackState

Build = Callable[..., es.Stack]
AMPLE = 1 << 30


def drawn(count: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(256) for _ in range(count)]


def outcome(request: Request) -> list[tuple[int, float, dict[int, float]]]:
    return [(int(t), t.logprob, t.top) for t in request.tokens]  # type: ignore[attr-defined]


def run(engine: Engine, prompts: Sequence[list[int]], together: bool = False) -> list[Request]:
    """Each prompt's request, one after the other, or all at once."""
    requests = []
    for prompt in prompts:
        requests.append(engine.submit(prompt, 3, temperature=0, logprobs=3))
        while not together and not engine.idle:
            engine.step()
    while not engine.idle:
        engine.step()
    return requests


def counted(store: PrefixStore) -> int:
    return sum(node.span.nbytes + (node.rest.nbytes if node.rest else 0) for node in store.nodes())


def check_equal(model: es.Stack, prompts: list[list[int]], prefill: int, **settings: int) -> PrefixStore:
    """The store, after the prompts in turn, and then all at once, have given the same with it and without."""
    plain = Engine(model, slots=2, max_tokens=80, prefill=prefill)
    stored = Engine(model, slots=2, max_tokens=80, prefill=prefill, **{"prefix_bytes": AMPLE, **settings})
    wanted, got = (run(engine, prompts) for engine in (plain, stored))
    assert [outcome(r) for r in got] == [outcome(r) for r in wanted]
    wanted, got = (run(engine, prompts, together=True) for engine in (plain, stored))
    assert [outcome(r)[0] for r in got] == [outcome(r)[0] for r in wanted]  # what was read is the same to the bit
    assert [r.tokens for r in got] == [r.tokens for r in wanted]  # other slots may round differently
    store = stored.prefixes
    assert store is not None
    assert store.bytes == counted(store) <= store.budget
    return store


def branching(base: list[int]) -> list[list[int]]:
    """Prompts that share some of `base`: up to, on and past multiples of 16."""
    cuts = (48, 15, 16, 17, 33, 47, 48)
    return [base[:cut] + drawn(9 - i % 3, seed=cut + i) for i, cut in enumerate(cuts)] + [base[:32], base[:32]]


@pytest.mark.parametrize(
    "preset",
    [
        "every_mixer_mini",
        "arch_expert_research_mini",
        "arch_advanced_mla_mini",
        "arch_expert_striped_hyena_mini",
        "arch_expert_falcon_h1_mini",
        "arch_expert_hymba_mini",
    ],
)
def test_what_follows_a_hit_equals_what_follows_reading(preset: str) -> None:
    torch.manual_seed(0)
    store = check_equal(es.build(es.load(preset)), branching(drawn(48)), prefill=16)
    assert store.hits > 8 and store.evictions == 0


def test_windows_that_have_wrapped_are_kept_whole(build_mini: Build) -> None:
    model = build_mini(torch.float32)  # its window is 7 tokens
    assert check_equal(model, branching(drawn(48)), prefill=16).hits > 8
    assert check_equal(model, branching(drawn(48)), prefill=5).hits > 8


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_store_that_must_evict_gives_the_same(build_mini: Build, share: float) -> None:
    model = build_mini(torch.float32)
    whole = check_equal(model, branching(drawn(48)), prefill=16).bytes
    store = check_equal(model, branching(drawn(48)), prefill=16, prefix_bytes=int(share * whole))
    assert store.evictions > 0 and store.bytes > 0


def test_a_hit_does_not_read_another_requests_slot(build_mini: Build) -> None:
    """The slots are poisoned between the request that fills the store and the one that is filled from it."""
    model, prompt = build_mini(torch.float32), drawn(40)
    (wanted,) = run(Engine(model, slots=3, max_tokens=80, prefill=16), [prompt])
    engine = Engine(model, slots=3, max_tokens=80, prefill=16, prefix_bytes=AMPLE)
    run(engine, [prompt])
    with torch.inference_mode():
        for layer in engine.state.layers:
            layer.map(lambda t: t.fill_(float("nan")))
    (got,) = run(engine, [prompt])
    assert engine.prefixes is not None and engine.prefixes.hits == 1
    assert outcome(got) == outcome(wanted)


def test_no_state_is_kept_before_its_chunk_is_whole(build_mini: Build) -> None:
    engine = Engine(build_mini(torch.float32), slots=2, max_tokens=80, prefill=16, prefix_bytes=AMPLE)
    prompt, store = drawn(41), engine.prefixes
    assert store is not None
    request, seen = engine.submit(prompt, 2), []
    while not engine.idle:
        engine.step()
        seen.append((request.read, store.find([*prompt, 0])))
    assert seen == [(16, 16), (32, 32), (41, 32), (41, 32)]
    assert sorted(node.end for node in store.nodes()) == [16, 32]


def test_steps_that_read_and_write_at_once_keep_the_same_states(build_mini: Build) -> None:
    model, prompt = build_mini(torch.float32), drawn(50)
    alone, mixed = (Engine(model, slots=2, max_tokens=80, prefill=16, prefix_bytes=AMPLE) for _ in range(2))
    run(alone, [prompt])
    mixed.submit([1], 60, temperature=0)
    mixed.step()
    request = mixed.submit(prompt, 4, temperature=0)
    while request.finished is None:
        mixed.step()
    assert alone.prefixes is not None and mixed.prefixes is not None
    wanted, got = (sorted(engine.prefixes.nodes(), key=lambda n: n.end) for engine in (alone, mixed))
    assert [node.end for node in got] == [16, 32, 48]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.key == theirs.key and mine.rest is not None and theirs.rest is not None
        for a, b in ((mine.span, theirs.span), (mine.rest, theirs.rest)):
            assert a.tensors.keys() == b.tensors.keys() and a.nbytes
            assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_states_land_where_prompts_still_agree() -> None:
    """Hits would stay at 0 % if states were kept at the prompts' own ends only."""
    torch.manual_seed(0)
    model = es.StackBuilder(d_model=16, n_heads=2, vocab_size=256, max_seq_len=1024).add("retnet").build()
    engine = Engine(model, slots=1, prefill=512, prefix_bytes=AMPLE)
    shared = drawn(700)
    run(engine, [shared + drawn(50, seed) for seed in (1, 2, 3)])
    assert engine.prefixes is not None
    assert (engine.prefixes.hits, engine.prefixes.tokens_reused) == (2, 2 * 512)


def test_prompts_that_come_at_once_read_what_they_share_once(build_mini: Build) -> None:
    """Nothing is stored yet when they take their slots; each goes on from what another has read meanwhile."""
    model, shared = build_mini(torch.float32), drawn(48)
    prompts = [shared + drawn(8, seed) for seed in (1, 2, 3)]
    plain, stored = (Engine(model, slots=3, max_tokens=80, prefill=16, prefix_bytes=size) for size in (None, AMPLE))
    wanted, got = (run(engine, prompts, together=True) for engine in (plain, stored))
    assert [outcome(r) for r in got] == [outcome(r) for r in wanted]
    assert stored.prefixes is not None
    assert stored.prefixes.tokens_reused == 2 * len(shared)


def test_prompts_cancelled_while_they_are_read_leave_whole_chunks_and_nothing_else(build_mini: Build) -> None:
    model, prompt = build_mini(torch.float32), drawn(60)
    engine = Engine(model, slots=2, max_tokens=80, prefill=16, prefix_bytes=AMPLE)
    request = engine.submit(prompt, 4)
    engine.step()
    engine.cancel(request)
    store = engine.prefixes
    assert store is not None and store.find(prompt) == 16
    held = store.bytes
    for _ in range(5):  # cancelled right after they were filled
        request = engine.submit(prompt[:18], 4)
        engine.step()
        engine.cancel(request)
    assert engine.idle and not engine.active and not engine.reading
    assert store.bytes == held == counted(store)
    (wanted,) = run(Engine(model, slots=2, max_tokens=80, prefill=16), [prompt])
    assert outcome(run(engine, [prompt])[0]) == outcome(wanted)


def test_random_arrivals_cancellations_and_evictions_leak_nothing(build_mini: Build) -> None:
    model, dice = build_mini(torch.float32), random.Random(0)
    base, each = drawn(64), build_mini(torch.float32).init_state(1, 80).nbytes()
    engine = Engine(model, slots=3, max_tokens=80, prefill=8, prefix_bytes=2 * each)
    requests = list[Request]()
    for _ in range(100):
        if dice.random() < 0.4:
            prompt = base[: dice.randrange(64)] + drawn(dice.randint(1, 6), dice.randrange(5))
            requests.append(engine.submit(prompt, dice.randint(1, 6), temperature=0, logprobs=3))
        if requests and dice.random() < 0.1:
            engine.cancel(dice.choice(requests))
        engine.step()
        assert engine.prefixes is not None
        assert engine.prefixes.bytes == counted(engine.prefixes) <= 2 * each
    while not engine.idle:
        engine.step()
    assert engine.prefixes is not None and engine.prefixes.evictions and engine.prefixes.hits
    assert not engine.active and not engine.reading and not engine.waiting
    plain = Engine(model, slots=3, max_tokens=80, prefill=8)
    for request in requests[:10]:
        if request.finished == "length":
            again = plain.submit(request.prompt, request.max_new_tokens, temperature=0, logprobs=3)
            while not plain.idle:
                plain.step()
            assert [int(t) for t in again.tokens] == [int(t) for t in request.tokens]


def test_echo_reads_all_of_its_prompt_and_leaves_it_to_others(build_mini: Build) -> None:
    model, prompt = build_mini(torch.float32), drawn(40)
    engine = Engine(model, slots=1, max_tokens=80, prefill=16, prefix_bytes=AMPLE)
    run(engine, [prompt])
    request = engine.submit(prompt, 1, echo=True)
    while not engine.idle:
        engine.step()
    assert engine.prefixes is not None and engine.prefixes.hits == 0
    assert [int(token) for token in request.scores] == prompt[1:]


def test_budgets_are_bytes(build_mini: Build) -> None:
    with pytest.raises(ValueError, match="budget = 0 bytes"):
        Engine(build_mini(), max_tokens=80, prefix_bytes=0)
    model = build_mini(torch.float32)
    engine = Engine(model, max_tokens=80, prefill=16, prefix_bytes=100)
    run(engine, [drawn(40)])
    assert engine.prefixes is not None
    assert (engine.prefixes.bytes, list(engine.prefixes.nodes())) == (0, [])  # no chunk fits: none is stored


# The tree alone, over small states made of the tokens themselves.

GRID = 2


@dataclass(frozen=True)
class Sum(LayerState):
    """total [B, 1] of the tokens read."""

    KINDS: ClassVar[dict[str, str]] = {"total": "sum"}
    total: Tensor


def state_of(tokens: Sequence[int]) -> StackState:
    """A row that has read the tokens: keys are the tokens in their slots, the sum is a code of all of them."""
    keys = torch.zeros(1, 20, 1, 1, dtype=torch.int64)
    keys[0, : len(tokens), 0, 0] = torch.tensor(tokens, dtype=torch.int64)
    code = sum((token + 1) * 5**i for i, token in enumerate(tokens))
    length = torch.tensor([len(tokens)])
    return StackState((KVState(keys, -keys), Sum(torch.tensor([[code]]))), length, length.clone(), len(tokens), 20)


def check_filled(store: PrefixStore, prompt: list[int]) -> int:
    """How much of a prompt was stored; what the row holds then is what reading that much leaves."""
    row = state_of([])
    found = store.fill(prompt, row)
    wanted = state_of(prompt[:found])
    for mine, theirs in zip(row.layers, wanted.layers, strict=True):
        for a, b in zip(mine.tensors().values(), theirs.tensors().values(), strict=True):
            assert torch.equal(a, b)
    assert row.length.tolist() == row.reach.tolist() == [found]
    return found


def read(store: PrefixStore, prompt: list[int]) -> None:
    """As the engine does: go on from what is stored, and keep each whole chunk."""
    start = check_filled(store, prompt)
    for end in range(start + GRID, len(prompt) + 1, GRID):
        store.add(prompt[:end], state_of(prompt[:end]))


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=20)
CHUNK, SUM = GRID * 2 * 8, 8  # bytes of keys and values of a chunk, and of a sum


@given(PROMPTS, st.lists(st.integers(0, 2), min_size=1, max_size=13))
def test_finds_what_a_plain_dictionary_finds(prompts: list[list[int]], sought: list[int]) -> None:
    store, plain = PrefixStore(AMPLE, GRID, lambda n: n), set[tuple[int, ...]]()
    for prompt in prompts:
        read(store, prompt)
        plain |= {tuple(prompt[:end]) for end in range(GRID, len(prompt) + 1, GRID)}
    ends = [end for end in range(GRID, len(sought), GRID) if tuple(sought[:end]) in plain]
    assert store.find(sought) == max(ends, default=0) == check_filled(store, sought)
    assert store.bytes == counted(store) == len(plain) * (CHUNK + SUM)  # equal chunks are stored once


@given(PROMPTS, st.integers(1, 8 * CHUNK))
def test_budget_holds_and_every_leaf_is_of_use(prompts: list[list[int]], budget: int) -> None:
    store = PrefixStore(budget, GRID, lambda n: n * n)
    for prompt in prompts:
        read(store, prompt)
        assert store.bytes == counted(store) <= budget
        assert all(node.children or node.rest for node in store.nodes())
        fits = len(prompt) // GRID * CHUNK + SUM <= budget
        if fits and len(prompt) >= GRID:
            assert store.find([*prompt, 0]) == len(prompt) // GRID * GRID  # the newest was not refused


def way(node: Node) -> list[Node]:
    """From a node up to the root's child."""
    return [node, *way(node.parent)] if node.parent else []


@given(PROMPTS, st.integers(2, 6))
def test_evicts_what_the_formula_says(prompts: list[list[int]], room: int) -> None:
    """Against the formula written out: of all states that may go, the one worth least goes."""
    store = PrefixStore(room * (CHUNK + SUM), GRID, lambda n: n * n)
    choose = store._victim

    def checked(last: Node) -> Node:
        nodes, used, efficiency = list(store.nodes()), dict[Node, int](), dict[Node, float]()
        for node in nodes:
            if node.rest and len(node.children) + (node is last) < 2:
                others = [n for n in nodes if n.rest and n is not node]
                needed = {above for n in (*others, last) for above in way(n)}
                start = max((above.end for above in way(node)[1:] if above.rest), default=0)
                used[node] = node.used
                efficiency[node] = (node.end**2 - start**2) / (SUM + CHUNK * (len(nodes) - len(needed)))
        age, best, oldest = max(1, store._clock - min(used.values())), max(efficiency.values()), min(used.values())
        scores = {node: (used[node] - oldest) / age + ALPHA * efficiency[node] / best for node in used}
        chosen = choose(last)
        assert scores[chosen] == pytest.approx(min(scores.values()))
        return chosen

    store._victim = checked  # type: ignore[method-assign]
    for prompt in prompts:
        read(store, prompt)


def test_deep_states_outlive_shallow_ones_of_the_same_age() -> None:
    """Reading up to a deep state costs more, and its bytes are the same."""
    store = PrefixStore(4 * CHUNK + 2 * SUM, GRID, lambda n: n * n)
    deep, shallow = [1] * 6, [2, 2]
    store.add(deep, state_of(deep))
    store.add(shallow, state_of(shallow))
    assert store.bytes == store.budget
    for node in store.nodes():
        node.used = 1
    store.add([0, 0], state_of([0, 0]))
    assert (store.find([*deep, 0]), store.find([*shallow, 0]), store.find([0, 0, 0])) == (6, 0, 2)


def test_a_span_outlives_its_state_while_another_needs_it() -> None:
    store = PrefixStore(3 * CHUNK + 3 * SUM, GRID, lambda n: n)
    long = [1, 1, 2, 2, 1, 1]
    for end in (2, 4, 6):
        store.add(long[:end], state_of(long[:end]))
    inner = sorted(store.nodes(), key=lambda n: n.end)[:2]
    for node in inner:
        store._evict(node, store.root)
    assert store.bytes == counted(store) == 3 * CHUNK + SUM
    assert check_filled(store, [*long, 0]) == 6 and check_filled(store, long[:5]) == 0
    store.add(long[:2], state_of(long[:2]))  # read anew, the span is there
    assert store.bytes == 3 * CHUNK + 2 * SUM and check_filled(store, long[:5]) == 2
    store._evict(max(store.nodes(), key=lambda n: n.end), store.root)  # and with it the one in the middle
    assert store.bytes == counted(store) == CHUNK + SUM


def test_recurrent_sums_need_no_slots() -> None:
    kv = torch.ones(1, 1, 2, 2)
    length = torch.tensor([2])
    row = StackState((RetentionState(kv),), length, length.clone(), 2, 20)
    store = PrefixStore(AMPLE, GRID, lambda n: n)
    store.add([1, 1], row)
    kv.fill_(7)  # the row goes on
    empty = StackState((RetentionState(torch.zeros_like(kv)),), torch.tensor([0]), torch.tensor([0]), 0, 20)
    assert store.fill([1, 1, 5], empty) == 2 and store.bytes == kv.nbytes
    assert empty.layers[0].tensors()["kv"].unique().tolist() == [1]
