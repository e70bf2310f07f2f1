"""StackState: fork, snapshot, rollback, save."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eulerstack as es
from eulerstack.segments import Segments
from eulerstack.state import Saved

from .conftest import close
from .inference.test_tape import KINDS, stack_of, told

Build = Callable[..., es.Stack]


def test_select_forks_and_reorders_rows(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (3, 12))
    with torch.no_grad():
        _, state = model.chunkwise(tokens, model.init_state(3, 40))
        fork = state.select([2, 0, 2])
        more = torch.randint(0, 256, (3, 1))
        got, _ = model.recurrent(more, fork)
        wanted = model.parallel(torch.cat([tokens[[2, 0, 2]], more], 1))[:, -1:]
        close(got, wanted, 1e-12)
        untouched, _ = model.recurrent(more, state)  # the fork's step left its origin alone
        close(untouched, model.parallel(torch.cat([tokens, more], 1))[:, -1:], 1e-12)
    with pytest.raises(ValueError, match="reach outside"):
        state.select([3])


def test_snapshot_is_untouched_by_later_steps(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        _, state = model.chunkwise(tokens[:, :10], model.init_state(2, 40))
        kept = state.snapshot()
        first, state = model.chunkwise(tokens[:, 10:], state)
        state = state.restore(kept)
        assert state.length.tolist() == [10, 10]
        second, _ = model.chunkwise(tokens[:, 10:], state)
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="cannot restore"):
        state.restore(model.init_state(1, 40))


def test_reset_starts_rows_over(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (2, 10))
    with torch.no_grad():
        _, state = model.chunkwise(tokens, model.init_state(2, 40))
        state = state.reset([1])
        assert state.length.tolist() == [10, 0]
        got, _ = model.chunkwise(tokens, state)
        close(got[1:], model.parallel(tokens[1:]), 1e-12)
        close(got[:1], model.parallel(torch.cat([tokens, tokens], 1)[:1])[:, 10:], 1e-12)


def test_rows_are_put_among_others(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (3, 14))
    with torch.inference_mode():
        _, batch = model.chunkwise(tokens[:2, :9], model.init_state(2, 40))
        _, one = model.chunkwise(tokens[2:, :4], model.init_state(1, 40))
        batch = batch.put([0], one)
        assert batch.length.tolist() == [4, 9]
        real = torch.tensor([[True], [False]])
        for at in range(4, 14):  # the other row waits
            got, batch = model.recurrent(tokens[[2, 0], at : at + 1], batch, Segments(real=real))
            close(got[:1], model.parallel(tokens[2:])[:, at : at + 1], 1e-12)
        got, _ = model.recurrent(tokens[[1, 1], 9:10], batch.select([1, 1]))
        close(got[1:], model.parallel(tokens[1:2])[:, 9:10], 1e-12)
        moved = batch.put([0], batch.map(lambda t: t[1:2]))  # a row of the state itself
        assert moved.length.tolist() == [9, 9]
        assert all(torch.equal(t[0], t[1]) for layer in moved.layers for t in layer.tensors().values())
        kept = moved.snapshot()
        same = moved.put([1], moved.map(lambda t: t[1:2]))  # the very row
        assert all(torch.equal(a, b) for a, b in zip(same.tensors().values(), kept.tensors().values(), strict=True))
        for other in (model.init_state(1, 30), model.init_state(2, 40)):
            with pytest.raises(ValueError, match="cannot put"):
                batch.put([0], other)


def test_forks_are_rows_of_their_own(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        _, state = model.chunkwise(tokens, model.init_state(2, 40))
        fork, more = state.fork(3), torch.randint(0, 256, (6, 2))
        assert fork.length.tolist() == [12] * 6
        close(model.chunkwise(more, fork)[0], told(model, tokens.repeat_interleave(3, 0).tolist(), more), 1e-12)
        close(model.chunkwise(more[:2], state)[0], told(model, tokens.tolist(), more[:2]), 1e-12)
    with pytest.raises(ValueError, match="copies = 0"):
        fork.fork(0)


def test_states_join_and_rows_leave(build_mini: Build) -> None:
    model, tokens, more = build_mini(), torch.randint(0, 256, (3, 20)), torch.randint(0, 256, (3, 2))
    with torch.no_grad():
        _, two = model.chunkwise(tokens[:2, :9], model.init_state(2, 40))
        _, one = model.chunkwise(tokens[2:], model.init_state(1, 40))
        rows = [tokens[2].tolist(), tokens[0, :9].tolist(), tokens[1, :9].tolist()]
        joined = one.join(two)
        assert (joined.batch, joined.length.tolist(), joined.bound) == (3, [20, 9, 9], 20)
        close(model.chunkwise(more, joined.snapshot())[0], told(model, rows, more), 1e-12)
        close(model.chunkwise(more[:2], joined.select([0, 2]))[0], told(model, [rows[0], rows[2]], more[:2]), 1e-12)
        close(model.chunkwise(more[:2], two)[0], told(model, rows[1:], more[:2]), 1e-12)  # the join is a copy
        for other in (model.init_state(1, 30), positional().init_state(1, 40)):
            with pytest.raises(ValueError, match=r"cannot join rows of another form.*max_tokens=40"):
                one.join(other)


@pytest.mark.parametrize("name", KINDS)
def test_beam_reorder_permutes_rows_and_not_heads(name: str) -> None:
    """As many rows as heads, so that a select over the wrong axis fits and shows."""
    model, tokens, more = stack_of(name), torch.randint(0, 256, (4, 15)), torch.randint(0, 256, (4, 3))
    order = [2, 0, 3, 3]
    with torch.no_grad():
        _, state = model.chunkwise(tokens, model.init_state(4, 40))
        close(model.chunkwise(more, state.select(order))[0], told(model, tokens[order].tolist(), more), 1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_multi_token_continuation_sees_the_state(name: str) -> None:
    model, tokens, more = stack_of(name), torch.randint(0, 256, (2, 15)), torch.randint(0, 256, (2, 9))
    wanted = told(model, tokens.tolist(), more)
    with torch.no_grad():
        _, state = model.chunkwise(tokens, model.init_state(2, 40))
        empty = model.init_state(2, 40)
        assert (model.chunkwise(more, empty)[0] - wanted).abs().max() > 0.1 * wanted.abs().max()  # ignoring it shows
        close(model.chunkwise(more, state)[0], wanted, 1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_conv_state_has_its_width_after_prompts_of_any_length(count: int) -> None:
    model = es.build(es.load("every_mixer_mini"), dtype=torch.float64)
    tokens, more = torch.randint(0, 256, (2, count)), torch.randint(0, 256, (2, 5))
    with torch.no_grad():
        empty = model.init_state(2, 40)
        widths = [{name: t.shape for name, t in layer.tensors().items()} for layer in empty.layers]
        _, state = model.chunkwise(tokens, empty)
        assert [{name: t.shape for name, t in layer.tensors().items()} for layer in state.layers] == widths
        close(model.chunkwise(more, state)[0], told(model, tokens.tolist(), more), 1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_right_padded_prefill_leaves_the_state_of_the_prompt(name: str) -> None:
    """Padding behind a prompt that is as long as a chunk or more enters nothing."""
    model, tokens, more = stack_of(name), torch.randint(0, 256, (3, 30)), torch.randint(0, 256, (3, 4))
    lengths = torch.tensor([30, 3, 13])
    with torch.no_grad():
        segments = Segments(real=torch.arange(30) < lengths[:, None])
        _, state = model.chunkwise(tokens, model.init_state(3, 40), segments)
        rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        close(model.chunkwise(more, state)[0], told(model, rows, more), 1e-12)


def positional(window: int | None = None) -> es.Stack:
    torch.manual_seed(0)
    b = es.StackBuilder(d_model=32, n_heads=4, max_seq_len=128).add("attention")
    return b.add("attention", {"window": window}).build(dtype=torch.float64)


@pytest.mark.parametrize("back", [0, 3, torch.tensor([1, 4])])
@pytest.mark.parametrize("window", [None, 6])
def test_rollback_of_positional_state_is_exact(window: int | None, back: int | torch.Tensor) -> None:
    model, tokens = positional(window), torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        _, state = model.chunkwise(tokens[:, :20], model.init_state(2, 60, rollback=4))
        _, state = model.chunkwise(tokens[:, 20:], state)
        state = state.rollback(back)
        lengths = state.length.tolist()
        more = torch.randint(0, 256, (2, 3))
        got, _ = model.chunkwise(more, state)
        for row, length in enumerate(lengths):
            whole = torch.cat([tokens[row : row + 1, :length], more[row : row + 1]], 1)
            close(got[row : row + 1], model.parallel(whole)[:, -3:], 1e-12)


def test_rollback_refuses_what_it_cannot_undo(build_mini: Build) -> None:
    model = build_mini()
    with torch.no_grad():
        _, state = model.chunkwise(torch.zeros(1, 9, dtype=torch.int64), model.init_state(1, 20))
    with pytest.raises(ValueError, match=r"layer 0 keeps SSM and conv state"):
        state.rollback(1)
    with pytest.raises(ValueError, match="the rows hold"):
        state.rollback(10)
    narrow = positional(6)
    with torch.no_grad():
        _, state = narrow.chunkwise(torch.zeros(1, 20, dtype=torch.int64), narrow.init_state(1, 60, rollback=2))
    with pytest.raises(ValueError, match=r"init_state\(..., rollback=N\)"):
        state.rollback(3)
    assert state.rollback(2).length.tolist() == [18]


def test_rollbacks_add_up() -> None:
    model = positional(5)
    tokens = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        _, state = model.chunkwise(tokens, model.init_state(1, 60, rollback=4))
        state = state.rollback(3)
        with pytest.raises(ValueError, match="cannot roll back 5 tokens"):
            state.rollback(2)
        state = state.rollback(1)
        got, _ = model.chunkwise(tokens[:, :3], state)
        close(got, model.parallel(torch.cat([tokens[:, :16], tokens[:, :3]], 1))[:, -3:], 1e-12)


def test_rows_are_numbers(build_mini: Build) -> None:
    state = build_mini().init_state(2, 9)
    for rows in (torch.tensor([True, False]), [0.5], [-1], [2]):
        for act in (state.select, state.reset):
            with pytest.raises(ValueError, match="rows"):
                act(rows)  # type: ignore[arg-type]


def test_a_state_of_inference_mode_goes_on_without_it(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (1, 12))
    with torch.inference_mode():
        _, state = model.chunkwise(tokens[:, :10], model.init_state(1, 20))
    with torch.no_grad():
        got, _ = model.chunkwise(tokens[:, 10:], state)
        close(got, model.parallel(tokens)[:, 10:], 1e-12)


def test_saved_states_come_back_to_the_bit_and_to_their_own_model(build_mini: Build, tmp_path: Path) -> None:
    model, tokens, file = build_mini(), torch.randint(0, 256, (2, 20)), tmp_path / "state.safetensors"
    with torch.no_grad():
        _, state = model.chunkwise(tokens, model.init_state(2, 40))
        state.save(file, model)
        loaded = es.StackState.load(file, model)
        assert loaded.length.tolist() == [20, 20]
        more = torch.randint(0, 256, (2, 5))
        one, two = model.chunkwise(more, state)[0], model.chunkwise(more, loaded)[0]
    assert torch.equal(one, two)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ValueError, match="another model"):
        es.StackState.load(file, model)
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a saved state"):
        es.StackState.load(file, model)


def test_bytes_are_counted_by_kind(build_mini: Build) -> None:
    state = build_mini(torch.float32).init_state(2, 50)
    kinds = state.bytes_by_kind()
    assert set(kinds) == {"KV", "retention", "SSM", "conv"}
    assert kinds["KV"] == 2 * 2 * (50 + 7) * 2 * 8 * 4  # keys and values, rows, slots, kv heads, channels, bytes
    assert kinds["retention"] == 2 * 4 * 8 * 16 * 4
    assert state.nbytes() == sum(kinds.values())


def test_gradients_flow_through_a_state(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (1, 20))
    whole = torch.autograd.grad(model.parallel(tokens)[:, 10:].sum(), model.embedding.weight)[0]
    _, state = model.chunkwise(tokens[:, :10], model.init_state(1, 20))
    logits, _ = model.chunkwise(tokens[:, 10:], state)
    close(torch.autograd.grad(logits.sum(), model.embedding.weight)[0], whole, 1e-12)


def test_slots_of_positions_and_the_rest_are_the_whole_state(build_mini: Build) -> None:
    state = build_mini().init_state(2, 20)
    span, rest = state.span(3, 8), state.rest()
    assert {name: tuple(t.shape) for name, t in span.items()} == {f"2.{n}": (2, 5, 2, 8) for n in ("keys", "values")}
    assert rest.keys() == {"0.ssm", "0.conv", "1.kv", "3.keys", "3.values"}  # a window's slots hold many positions
    assert sum(t.nbytes for t in (*state.span(0, 20).values(), *rest.values())) == state.nbytes()
    hyena = es.build(es.load("every_mixer_mini")).init_state(1, 9)
    assert any(name.endswith(".inputs") for name in hyena.span(0, 9))


def test_saved_files_hold_what_is_in_use_and_are_whole(build_mini: Build, tmp_path: Path) -> None:
    model, file = build_mini(torch.float32), tmp_path / "state.safetensors"
    with torch.no_grad():
        _, state = model.chunkwise(torch.randint(0, 256, (2, 20)), model.init_state(2, 200))
    state.save(file, model, beside=torch.arange(3))
    saved = Saved.open(file, model)
    used = model.init_state(2, 20).nbytes()
    assert sum(t.nbytes for t in saved.tensors.values()) == used + 2 * 2 * 8 + 3 * 8
    assert saved.tensors["beside"].tolist() == [0, 1, 2] and saved.made(model).nbytes() == state.nbytes()
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    with pytest.raises(OSError, match="cannot be written"):
        state.save(tmp_path / "nowhere" / "state.safetensors", model)
    for other in (model.init_state(1, 200), model.init_state(2, 19)):
        with pytest.raises(ValueError, match="holds 2 rows of up to 20 tokens"):
            saved.into(other)
    with pytest.raises(ValueError, match="another rollback"):
        saved.into(model.init_state(2, 200, rollback=3))


def test_files_of_another_format_are_refused(build_mini: Build, tmp_path: Path) -> None:
    model, file = build_mini(), tmp_path / "state.safetensors"
    save_file({"length": torch.zeros(1)}, str(file), {"eulerstack": json.dumps({"format": 1})})
    with pytest.raises(ValueError, match="has state format 1; this version reads 2"):
        es.StackState.load(file, model)
    save_file({"length": torch.zeros(1)}, str(file), {"eulerstack": "{"})
    with pytest.raises(ValueError, match="is not a saved state"):
        es.StackState.load(file, model)
    save_file({"length": torch.zeros(1)}, str(file))
    with pytest.raises(ValueError, match="not a state saved by eulerstack"):
        es.StackState.load(file, model)
