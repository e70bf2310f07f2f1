"""State handed from row to row: rows of T are one long sequence, gradients end where rows do, resume is exact."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import eulerstack as es
from eulerstack.data.order import InStreams
from eulerstack.data.rows import Streamed, Windows
from eulerstack.segments import Segments
from eulerstack.state import StackState

from .conftest import QUIET
from .test_documents import KINDS

T = 24


def small(kind: str) -> es.Stack:
    torch.manual_seed(0)
    model = {"d_model": 16, "n_heads": 2, "max_seq_len": 4 * T, "mlp_ratio": 1.0, "vocab_size": 256}
    mixer, options = KINDS.get(kind, ("retnet", {"chunk_size": 8}))
    ffn = {"ffn": {"type": "moe", "moe": {"experts": 4, "top_k": 2}}} if kind == "experts" else {}
    return es.build(es.StackBuilder(**model).add(mixer, options, **ffn).spec(), dtype=torch.float64)


def trimixer() -> es.Stack:
    torch.manual_seed(0)
    return es.build(es.load("arch_expert_research_mini"), dtype=torch.float64)


def text(ends: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens and targets [2, 4 T], and their documents, which end at these places of the second row."""
    torch.manual_seed(1)
    tokens = torch.randint(256, (2, 4 * T + 1))
    document = torch.zeros_like(tokens)
    for end in ends:
        document[1, end:] += 1
    targets = torch.where(document[:, 1:] == document[:, :-1], tokens[:, 1:], -100)
    return tokens[:, :-1], targets, document


def rows_of(document: Tensor, row: int) -> Segments | None:
    """The segments of row number `row` of each stream, as `collate` makes them."""
    own = document[:, row * T : (row + 1) * T]
    same = own[:, 0] == document[:, row * T - 1] if row else torch.zeros(2, dtype=torch.bool)
    whole = bool((own == own[:, :1]).all())
    if whole and bool(same.all()):
        return None
    return Segments(document=None if whole else own, carries=None if bool(same.all()) else same)


def check_one_sequence(model: es.Stack, ends: list[int], tol: float = 1e-9) -> None:
    tokens, targets, document = text(ends)
    segments = Segments(document=document[:, :-1]) if ends else None
    _, whole = model.losses(tokens, targets, segments)
    state, sums, count = model.init_state(2, 4 * T), 0.0, 0
    for row in range(4):
        part = slice(row * T, (row + 1) * T)
        found = model.losses_from(tokens[:, part], targets[:, part], state, rows_of(document, row))
        state, own = found[2], int((targets[:, part] >= 0).sum())
        sums, count = sums + float(found[1]["cross_entropy"].detach()) * own, count + own
        assert not any(t.requires_grad for t in state.tensors().values())
    assert abs(sums / count - float(whole["cross_entropy"].detach())) < tol


@pytest.mark.parametrize("kind", [*KINDS, "experts"])
@pytest.mark.parametrize("ends", [[], [T, 2 * T + 5, 2 * T + 9]], ids=["one", "several"])
def test_rows_are_one_long_sequence(kind: str, ends: list[int]) -> None:
    check_one_sequence(small(kind), ends)


def test_rows_of_the_trimixer_are_one_long_sequence() -> None:
    check_one_sequence(trimixer(), [T, 2 * T + 5])


def gradients(model: es.Stack, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def check_truncated(model: es.Stack) -> None:
    """Against the chunkwise form whose incoming state is read as a constant, the loss by PyTorch's own function."""
    tokens, targets, _ = text([])
    state = model.losses_from(tokens[:, :T], targets[:, :T], model.init_state(2, 4 * T))[2]
    kept = state.snapshot()
    loss, _, _ = model.losses_from(tokens[:, T : 2 * T], targets[:, T : 2 * T], state)
    with torch.no_grad():
        _, before = model.chunkwise(tokens[:, :T], model.init_state(2, 4 * T))
    assert all(torch.allclose(a, b) for a, b in zip(kept.tensors().values(), before.tensors().values(), strict=True))
    logits, _ = model.chunkwise(tokens[:, T : 2 * T], before)
    by_hand = F.cross_entropy(logits.flatten(0, 1), targets[:, T : 2 * T].flatten())
    for mine, theirs in zip(gradients(model, loss), gradients(model, by_hand), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_end_where_the_row_does(kind: str) -> None:
    check_truncated(small(kind))


def test_gradients_of_the_trimixer_end_where_the_row_does() -> None:
    check_truncated(trimixer())


@pytest.fixture
def long_texts(tmp_path: Path) -> Path:
    folder = tmp_path / "long"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(90 + 40 * i)))
    return folder


def data(path: Path, **options: Any) -> es.TextData:
    made = es.TextData(
        str(path),
        cache_dir=str(path.parent / "cache"),
        **{"seq_len": 32, "batch_size": 3, "seed": 5, "carry_state": True, **options},
    )
    made.setup()
    return made


def test_rows_stand_in_the_order_of_the_text(long_texts: Path) -> None:
    made = data(long_texts)
    loader, shard = made.train_dataloader(), made.shards[0]["train"]
    streams: list[list[int]] = [[], [], []]
    begin = int(np.random.default_rng((5, 0)).integers(len(Windows(shard, 32))))
    for step, batch in enumerate(loader):
        assert batch.reach == int(np.diff(shard.starts, append=len(shard.tokens)).max())
        for slot in range(3):
            place = (begin + slot * len(loader) + step) % len(Windows(shard, 32)) * 32
            real = min(32, len(shard.tokens) - place)
            assert batch.tokens[slot, :real].tolist() == shard.tokens[place : place + real].tolist()
            goes_on = step > 0 and place > 0 and place not in shard.starts
            assert (batch.carries is None or bool(batch.carries[slot])) == goes_on
            streams[slot].append(place)
    assert all(len(set(one)) == len(loader) for one in streams)
    assert len({place for one in streams for place in one}) == 3 * len(loader)


def test_ranks_share_the_streams() -> None:
    both = [[*InStreams(20, 4, 1, (rank, 2))] for rank in (0, 1)]
    assert [[*a, *b] for a, b in zip(*both, strict=True)] == [*InStreams(20, 4, 1)]
    assert all(row >= 20 for row in InStreams(20, 4, 1).batch(5))  # a new epoch begins without a past


def test_the_first_row_of_a_document_carries_nothing(long_texts: Path) -> None:
    shard = data(long_texts).shards[0]["train"]
    rows = Streamed(Windows(shard, 1))  # a window a token
    found = [n for n in range(len(rows)) if not rows[n].carries]
    assert found == shard.starts.tolist()
    assert not rows[len(rows) + 5].carries


@pytest.fixture
def fit(stack_file: Path, long_texts: Path, tmp_path: Path) -> Callable[..., es.StackModule]:
    def run(steps: int, resume: Path | None = None, workers: int = 0, **options: Any) -> es.StackModule:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", ".*treespec.*", ".*weights_only.*"):
                warnings.filterwarnings("ignore", message=message)
            L.seed_everything(0, verbose=False)
            trainer = L.Trainer(max_steps=steps, max_epochs=-1, limit_val_batches=1, **{**QUIET, **options})
            module = es.StackModule(str(stack_file), schedule="constant", warmup_steps_ratio=0.0, dropout=0.1)
            trainer.fit(module, data(long_texts, workers=workers), ckpt_path=resume)
            trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    return run


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_resumes_to_the_bit(fit: Callable[..., es.StackModule], tmp_path: Path, workers: int) -> None:
    straight = fit(30, workers=workers)
    for stop in (7, 17) if workers else (17,):  # the second in another epoch than the first
        fit(stop, workers=workers)
        resumed = fit(30, tmp_path / f"{stop}.ckpt", workers=workers)
        pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        states = [module._carry.state for module in (resumed, straight)]
        assert all(isinstance(state, StackState) for state in states)
        both = zip(*(state.tensors().values() for state in states if state is not None), strict=True)
        assert all(torch.equal(a, b) for a, b in both)
    lost = torch.load(tmp_path / "17.ckpt", weights_only=True)
    lost["carried"] = None
    torch.save(lost, tmp_path / "lost.ckpt")
    other = fit(30, tmp_path / "lost.ckpt", workers=workers)
    pairs = zip(other.model.parameters(), straight.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)  # the state does matter


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_other_precisions_carry(fit: Callable[..., es.StackModule], precision: str) -> None:
    module = fit(12, precision=precision)
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "packed"}, "not with data.packing = packed"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b", "weight": 1}]}, "not with data.sources"),
    ],
)
def test_what_has_no_order_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        es.TextData(carry_state=True, **options)


def test_more_rows_than_text_is_refused(long_texts: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size = 999 rows, and the text has \d+ rows in all"):
        data(long_texts, batch_size=999).train_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.max_seq_len=64"], r"the longest has [\d,]+ tokens, more than model\.max_seq_len = 64"),
        (["training_hints.checkpointing=block"], "data.carry_state and checkpointing = block do not go together"),
        (["layer_templates.a.mixer.attention.attn_drop=0.1"], "set attn_drop to 0"),
        (["head={type: causal_lm_mtp, mtp: {head_template: r}}"], "trains no head that looks further ahead"),
        (["layer_templates.m.state={ssm_state: false}"], "keeps no state"),
    ],
)
def test_stacks_that_cannot_carry_are_refused(
    stack_file: Path, long_texts: Path, settings: list[str], message: str
) -> None:
    trainer = L.Trainer(max_steps=1, **QUIET)
    with pytest.raises(ValueError, match=message):
        trainer.fit(es.StackModule(str(stack_file), settings=settings), data(long_texts))


def test_layers_that_are_compiled_do_not_carry(stack_file: Path, long_texts: Path) -> None:
    module = es.StackModule(str(stack_file))
    module.compiled = True  # as the option leaves it, where there is a compiler
    module._built = es.build(module.spec)
    with pytest.raises(ValueError, match="which is not compiled; leave compile out"):
        L.Trainer(max_steps=1, **QUIET).fit(module, data(long_texts))
