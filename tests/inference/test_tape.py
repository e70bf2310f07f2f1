"""Tape: after going back, every mixer is where a run that never took the tokens would be."""

import random
from collections.abc import Callable

import pytest
import torch

import eulerstack as es
from eulerstack.inference.tape import Tape
from eulerstack.segments import Segments

from ..conftest import close
from ..contract.cases import MIXERS

Build = Callable[..., es.Stack]
KINDS = ("attention", "attention_window", "attention_latent_window", "branched", "branched_gate", "hyena_deep")
KINDS += ("linear_attention", "mamba1", "mamba2_groups", "retnet_gated", "rwkv")


def stack_of(name: str, dtype: torch.dtype = torch.float64) -> es.Stack:
    """The mixer between two layers of attention, with weights scaled up so that it matters."""
    kind, options = MIXERS[name]
    builder = es.StackBuilder(d_model=16, n_heads=4, n_kv_heads=2, max_seq_len=128, mlp_ratio=1.0)
    model = builder.add("attention").add(kind, options).add("attention", {"window": 6}).build(dtype=dtype)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("proj.weight"):
                weight.mul_(2.0)
    return model


def told(model: es.Stack, rows: list[list[int]], more: torch.Tensor) -> torch.Tensor:
    """Logits of `more` [B, T] behind each row's tokens, computed whole."""
    whole = [torch.tensor([row + after.tolist()]) for row, after in zip(rows, more, strict=True)]
    return torch.cat([model.parallel(tokens)[:, -more.shape[1] :] for tokens in whole])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("slack", [0, 64])
def test_each_row_goes_back_as_far_as_it_likes(name: str, slack: int) -> None:
    model, dice = stack_of(name), random.Random(name)
    with torch.no_grad():
        tape = Tape(model, model.init_state(3, 128, rollback=slack), every=8, keep=8)
        rows: list[list[int]] = [[], [], []]
        for _ in range(7):
            count = dice.randint(1, 9)
            tokens = torch.randint(0, 256, (3, count))
            if count == 1:
                tape.recurrent(tokens)
            else:
                tape.chunkwise(tokens)
            back = torch.tensor([dice.randint(0, min(12, len(row) + count)) for row in rows])
            tape.rollback(back)
            taken = [row + new for row, new in zip(rows, tokens.tolist(), strict=True)]
            rows = [row[: len(row) - n] for row, n in zip(taken, back.tolist(), strict=True)]
            more = torch.randint(0, 256, (3, 2))
            got = tape.chunkwise(more)
            close(got, told(model, rows, more), 1e-12)
            tape.rollback(2)
            assert tape.state.length.tolist() == [len(row) for row in rows]


def test_single_precision(build_mini: Build) -> None:
    model, tokens, more = build_mini(torch.float32), torch.randint(0, 256, (2, 50)), torch.randint(0, 256, (2, 5))
    with torch.no_grad():
        tape = Tape(model, model.init_state(2, 80), every=16)
        tape.chunkwise(tokens)
        tape.rollback(torch.tensor([3, 11]))
        close(tape.chunkwise(more), told(model, [tokens[0, :47].tolist(), tokens[1, :39].tolist()], more), 1e-5)


def test_replaying_the_same_chunk_gives_the_same_bits(build_mini: Build) -> None:
    model, tokens = build_mini(torch.float32), torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        _, never = model.chunkwise(tokens[:, :16], model.init_state(2, 80))
        _, never = model.chunkwise(tokens[:, 16:21], never)
        tape = Tape(model, model.init_state(2, 80), every=16)
        tape.chunkwise(tokens)
        tape.rollback(9)
        more = torch.randint(0, 256, (2, 6))
        assert torch.equal(tape.chunkwise(more), model.chunkwise(more, never)[0])


def test_rows_that_stay_stay_to_the_bit() -> None:
    model = es.build(es.load("every_mixer_mini"))
    with torch.no_grad():
        tape = Tape(model, model.init_state(3, 80), every=4)
        tape.chunkwise(torch.randint(0, 256, (3, 23)))
        before = tape.state.snapshot()
        tape.rollback(torch.tensor([0, 5, 0]))
    for layer, kept in zip(tape.state.layers, before.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor[[0, 2]], kept.tensors()[name][[0, 2]]), name


@pytest.mark.parametrize(("back", "idle"), [(7, 1), (3, 0)])
@pytest.mark.parametrize("name", KINDS)
def test_padding_and_packed_documents(name: str, back: int, idle: int) -> None:
    """The first row goes back to where its second document begins, or to 4 tokens behind that."""
    model, tokens = stack_of(name), torch.randint(0, 256, (4, 20))
    real = torch.ones(4, 20, dtype=torch.bool)
    real[1, :9] = False  # left padding
    real[2, 12:] = False  # right padding
    real[3] = False  # nothing at all
    document = torch.zeros(4, 20, dtype=torch.int64)
    document[0, 13:] = 1
    with torch.no_grad():
        tape = Tape(model, model.init_state(4, 80), every=6, keep=5)
        opening = torch.randint(0, 256, (4, 3))
        tape.chunkwise(opening)
        tape.chunkwise(tokens, Segments(real, document))
        assert tape.state.length.tolist() == [7, 14, 15, 3]
        tape.rollback(torch.tensor([back, 4, 2, idle]))
        rows = [tokens[0, 13 : 20 - back].tolist()]
        rows += [[*opening[1].tolist(), *tokens[1, 9:16].tolist()], [*opening[2].tolist(), *tokens[2, :10].tolist()]]
        rows.append(opening[3, : 3 - idle].tolist())
        more = torch.randint(0, 256, (4, 3))
        close(tape.chunkwise(more), told(model, rows, more), 1e-12)
        with pytest.raises(ValueError, match="the rows hold"):
            tape.rollback(torch.tensor([11 - back, 0, 0, 0]))
        fresh = Segments(carries=torch.tensor([False, True, True, True]))
        tape.chunkwise(tokens[:, :4], fresh)
        tape.rollback(2)
        rows = [row + after.tolist() for row, after in zip(rows, torch.cat([more, tokens[:, :2]], 1), strict=True)]
        close(tape.recurrent(more[:, :1]), told(model, [rows[0][-2:], *rows[1:]], more[:, :1]), 1e-12)


def test_too_far_is_refused_and_changes_nothing(build_mini: Build) -> None:
    model, tokens, more = build_mini(), torch.randint(0, 256, (2, 60)), torch.randint(0, 256, (2, 3))
    with torch.no_grad():
        tape = Tape(model, model.init_state(2, 80), every=8, keep=2)
        tape.chunkwise(tokens)
        with pytest.raises(ValueError, match=r"this Tape can go back to \[44, 44\].* larger keep \(now 2\) or every"):
            tape.rollback(torch.tensor([3, 17]))
        with pytest.raises(ValueError, match="the rows hold"):
            tape.rollback(61)
        with pytest.raises(ValueError, match="room for 80 tokens"):
            tape.chunkwise(tokens)
        close(tape.chunkwise(more), told(model, tokens.tolist(), more), 1e-12)
    for options in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="give 1 or more"):
            Tape(model, tape.state, **options)


def test_memory_is_bounded_and_what_it_says() -> None:
    model = es.build(es.load("every_mixer_mini"))
    with torch.no_grad():
        tape = Tape(model, model.init_state(2, 400, rollback=48), every=16, keep=3)
        for count in (5, 200, 1, 1, 40, 16, 17):
            tape.chunkwise(torch.randint(0, 256, (2, count)))
            tape.rollback(1)
    kinds = tape.state.bytes_by_kind()
    passing = tape.state.nbytes() - kinds["KV"] - kinds["latent"] - kinds["history"]
    assert tape.nbytes() == 3 * (passing + 2 * 8) + 2 * 8 * 48  # a length a row; the tokens
    assert tape.snapshots.kept.maxlen == len(tape.snapshots)


def test_attention_alone_is_cropped_and_nothing_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = stack_of("attention_latent"), torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        tape = Tape(model, model.init_state(2, 60, rollback=24), every=8, keep=3)
        tape.chunkwise(tokens)
        monkeypatch.setattr(Tape, "_replay", None)
        tape.rollback(torch.tensor([9, 17]))
        more = torch.randint(0, 256, (2, 3))
        close(tape.chunkwise(more), told(model, [tokens[0, :21].tolist(), tokens[1, :13].tolist()], more), 1e-12)


def test_ignored_rollback_refusal(build_mini: Build) -> None:
    """A state that cannot crop its layers says so, names what can, and is as it was."""
    model, tokens, more = build_mini(), torch.randint(0, 256, (1, 20)), torch.randint(0, 256, (1, 3))
    with torch.no_grad():
        _, state = model.chunkwise(tokens, model.init_state(1, 40))
        with pytest.raises(ValueError, match=r"layer 0 keeps SSM and conv state.*eulerstack.inference.tape.Tape"):
            state.rollback(1)
        close(model.chunkwise(more, state)[0], told(model, tokens.tolist(), more), 1e-12)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("attention", "attention_latent_window")])
def test_crop_shortens_kv_but_leaves_the_recurrent_state(name: str) -> None:
    """What a shorter position alone gives is far off; the tape brings all kinds of state back together."""
    model, tokens, more = stack_of(name), torch.randint(0, 256, (2, 24)), torch.randint(0, 256, (2, 2))
    wanted = told(model, tokens[:, :19].tolist(), more)
    with torch.no_grad():
        tape = Tape(model, model.init_state(2, 60, rollback=16), every=8)
        tape.chunkwise(tokens)
        cut = tape.state.snapshot().cropped(tape.state.length - 5)
        rewindable = all(layer.rewindable(5) for layer in cut.layers)
        off = (model.chunkwise(more, cut)[0] - wanted).abs().max() / wanted.abs().max()
        assert rewindable == (off < 1e-12)
        tape.rollback(5)
        close(tape.chunkwise(more), wanted, 1e-12)
