"""Parked sessions: turns through the disk are one conversation, and nothing that happens to a park loses what was there."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

import eulerstack as es
from eulerstack import state as state_module
from eulerstack.inference.engine import Engine, Request
from eulerstack.inference.sessions import Sessions

from ..conftest import close

Build = Callable[..., es.Stack]
TURNS = 4


def drawn(count: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(256) for _ in range(count)]


def turn(engine: Engine, prompt: list[int], count: int = 5, session: str | None = "talk", **rules: object) -> Request:
    """A request that nobody disturbs, to its end."""
    request = engine.submit(prompt, count, session=session, **{"temperature": 0, **rules})  # type: ignore[arg-type]
    while not engine.idle:
        engine.step()
    return request


def check_turns(model: es.Stack, folder: Path, prefill: int) -> None:
    """Each turn by an engine and Sessions of its own; against the whole text at once."""
    said: list[int] = []
    for i in range(TURNS):
        engine = Engine(model, slots=2, max_tokens=120, prefill=prefill, sessions=Sessions(folder, model))
        request = turn(engine, drawn(9 + 7 * i, i), logprobs=256)
        start = len(said) + 9 + 7 * i
        said += [*request.prompt, *(int(token) for token in request.tokens)]
        with torch.no_grad():
            wanted = model.parallel(torch.tensor([said]))[0, start - 1 : -1].double().log_softmax(-1)
        got = torch.tensor([[t.top[i] for i in range(256)] for t in request.tokens])  # type: ignore[attr-defined]
        close(got.double(), wanted, 1e-4)
        best = wanted.topk(2).values
        sure = best[:, 0] - best[:, 1] > 1e-3
        assert torch.equal(torch.tensor(request.tokens)[sure], wanted.argmax(-1)[sure])
    assert Sessions(folder, model).open("talk")[0] == said


@pytest.mark.parametrize("preset", ["every_mixer_mini", "arch_expert_hymba_mini", "arch_advanced_mla_mini"])
def test_turns_through_the_disk_are_one_conversation(preset: str, tmp_path: Path) -> None:
    check_turns(es.build(es.load(preset)), tmp_path, prefill=16)


@pytest.mark.parametrize("prefill", [5, 512])
def test_turns_go_on_past_windows_and_off_the_grid(build_mini: Build, tmp_path: Path, prefill: int) -> None:
    check_turns(build_mini(), tmp_path, prefill)


def test_a_turn_reads_what_was_drawn_last_and_then_to_the_next_multiple(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini()
    engine = Engine(model, slots=1, max_tokens=120, prefill=16, sessions=Sessions(tmp_path, model))
    turn(engine, drawn(20), 4)
    request, read = engine.submit(drawn(30, 1), 1, session="talk"), []
    while not engine.idle:
        engine.step()
        read.append(request.read)
    assert read == [32, 48, 54]  # from 23, the 24th not read
    tokens, saved = Sessions(tmp_path, model).open("talk")
    assert (len(tokens), saved.longest) == (55, 54)


def test_rules_and_scores_know_what_was_said_before(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini()
    engine = Engine(model, slots=1, max_tokens=120, prefill=16, sessions=Sessions(tmp_path, model))
    first = turn(engine, drawn(20), repetition_penalty=5.0)
    second = turn(engine, drawn(20, 1), repetition_penalty=5.0, echo=True)
    whole = turn(
        engine, [*first.prompt, *first.tokens, *second.prompt], session=None, repetition_penalty=5.0, echo=True
    )
    assert second.tokens == whole.tokens
    assert [int(token) for token in second.scores] == second.prompt  # the first of them too
    scores = [torch.tensor([t.logprob for t in r.scores[-20:]]) for r in (second, whole)]
    close(scores[0], scores[1], 1e-6)


def test_several_tokens_may_have_been_left_to_read(build_mini: Build, tmp_path: Path) -> None:
    model, said, prompt = build_mini(), drawn(18), drawn(12, 1)
    sessions = Sessions(tmp_path, model)
    with torch.no_grad():
        sessions.park("talk", model.chunkwise(torch.tensor([said[:13]]), model.init_state(1, 40))[1], said)
    engine = Engine(model, slots=1, max_tokens=120, prefill=16, sessions=sessions)
    got, whole = (turn(engine, p, session=s, echo=True) for p, s in ((prompt, "talk"), ([*said, *prompt], None)))
    assert got.tokens == whole.tokens and [int(token) for token in got.scores] == prompt
    scores = [torch.tensor([t.logprob for t in r.scores[-12:]]) for r in (got, whole)]
    close(scores[0], scores[1], 1e-6)


def test_a_stop_parks_and_a_cancelled_turn_leaves_what_was(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini()
    engine = Engine(model, slots=1, max_tokens=120, prefill=16, sessions=Sessions(tmp_path, model))
    free = turn(engine, drawn(20), 8, session=None).tokens
    stopped = turn(engine, drawn(20), 8, stop=[free[3]])
    assert stopped.finished == "stop"
    assert Sessions(tmp_path, model).open("talk")[0] == [*stopped.prompt, *stopped.tokens]
    file = tmp_path / "talk.safetensors"
    before = file.read_bytes()
    for steps in (0, 1, 2, 4):  # while it waits, reads, and writes
        request = engine.submit(drawn(20, 1), 8, session="talk", temperature=0)
        for _ in range(steps):
            engine.step()
        engine.cancel(request)
        assert file.read_bytes() == before and engine.idle
    fresh = engine.submit(drawn(20), 8, session="other")
    engine.step()
    engine.cancel(fresh)
    assert Sessions(tmp_path, model).ids() == ["talk"]


def test_a_session_has_one_turn_at_a_time(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini()
    engine = Engine(model, slots=1, max_tokens=120, sessions=Sessions(tmp_path, model))
    turn(engine, drawn(5), 3)
    first = engine.submit(drawn(5), 3, session="talk")
    other = engine.submit(drawn(5), 3, session="other")  # waits
    for session in ("talk", "other"):
        with pytest.raises(ValueError, match=f"session = '{session}' has a request that has not ended"):
            engine.submit(drawn(5), 3, session=session)
    engine.step()
    with pytest.raises(ValueError, match="not ended"):
        engine.submit(drawn(5), 3, session="talk")
    while not engine.idle:
        engine.step()
    assert (first.finished, other.finished) == ("length", "length")
    turn(engine, drawn(5), 3)
    with pytest.raises(ValueError, match="session = 'talk' has no place"):
        Engine(model, slots=1, max_tokens=120).submit(drawn(5), 3, session="talk")


def test_only_what_was_read_on_the_grid_enters_the_prefix_store(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini(torch.float32)
    engine = Engine(model, 1, 120, prefill=16, prefix_bytes=1 << 30, sessions=Sessions(tmp_path, model))
    store = engine.prefixes
    assert store is not None
    first = turn(engine, drawn(20))
    assert [node.end for node in store.nodes()] == [16]
    second = turn(engine, drawn(30, 1))
    assert [node.end for node in store.nodes()] == [16] and store.hits == 0
    turn(engine, [*first.prompt, *first.tokens, *second.prompt], session="new")
    assert sorted(node.end for node in store.nodes()) == [16, 32, 48] and store.hits == 1


def test_sessions_move_to_slots_of_other_sizes(tmp_path: Path) -> None:
    builder = es.StackBuilder(d_model=32, n_heads=4, vocab_size=256, max_seq_len=256)
    model = builder.add("attention", {"window": 50}).add("hyena", {"filter_hidden": 8}).build(dtype=torch.float64)
    small = Engine(model, 1, 40, sessions=Sessions(tmp_path, model))  # 40 slots, each of one position
    first = turn(small, drawn(30))
    wide = Engine(model, 1, 200, sessions=Sessions(tmp_path, model))  # a ring of 50
    second = turn(wide, drawn(60, 1))
    assert second.tokens == turn(wide, [*first.prompt, *first.tokens, *second.prompt], session=None).tokens
    with pytest.raises(ValueError, match=r"holds 1 rows of up to 99 tokens, and there is room for 1 of 40"):
        small.submit([1], 1, session="talk")
    with pytest.raises(ValueError, match="more than the 200 tokens of a slot"):
        wide.submit([1] * 90, 20, session="talk")
    assert small.idle and wide.idle


def held(file: Path) -> int:
    """Bytes of a file's tensors."""
    with safe_open(str(file), framework="pt") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 - no mapping


def test_bytes_on_disk_are_those_in_use(build_mini: Build, tmp_path: Path) -> None:
    model, sessions = build_mini(torch.float32), Sessions(tmp_path, build_mini(torch.float32))
    with torch.no_grad():
        _, state = model.chunkwise(torch.tensor([drawn(30)]), model.init_state(1, 200))
    sessions.park("talk", state, drawn(31))
    used = model.init_state(1, 30).nbytes()  # a window's 7 slots are there in both
    file = tmp_path / "talk.safetensors"
    assert held(file) == used + 16 + 4 * 31  # the position; the tokens
    assert held(file) <= file.stat().st_size < held(file) + 3000
    tokens, resumed = sessions.resume("talk")
    assert tokens == drawn(31) and resumed.nbytes() == state.nbytes()
    assert (resumed.max_tokens, resumed.bound, resumed.length.tolist()) == (200, 30, [30])
    for mine, theirs in zip(resumed.layers, state.layers, strict=True):
        assert all(map(torch.equal, mine.tensors().values(), theirs.tensors().values()))


@pytest.mark.parametrize(
    "name", ["", "../talk", "a/b", "a b", "a" * 65, "é", "talk\n", ".talk", "talk.safetensors", "\0"]
)
def test_ids_are_no_paths(build_mini: Build, tmp_path: Path, name: str) -> None:
    model = build_mini()
    sessions = Sessions(tmp_path / "in", model)
    engine = Engine(model, 1, 60, sessions=sessions)
    for act in (
        lambda: sessions.park(name, model.init_state(1, 9), []),
        lambda: sessions.resume(name),
        lambda: sessions.forget(name),
        lambda: engine.submit([1], 1, session=name),
    ):
        with pytest.raises(ValueError, match="must be 1 to 64 letters"):
            act()
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]


def test_sessions_are_listed_and_forgotten(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini()
    sessions = Sessions(tmp_path, model)
    for name in ("b", "A-1_", "c" * 64):
        sessions.park(name, model.init_state(1, 9), [1])
    (tmp_path / "not a session.safetensors").touch()
    assert sessions.ids() == sorted(["b", "A-1_", "c" * 64])
    sessions.forget("b")
    assert "b" not in sessions and len(sessions.ids()) == 2
    for act in (sessions.forget, sessions.resume):
        with pytest.raises(ValueError, match="no session is parked as 'b'"):
            act("b")
    with pytest.raises(ValueError, match=r"0 tokens do not go with a state of \[3\]"), torch.no_grad():
        sessions.park("b", model.chunkwise(torch.ones(1, 3).long(), model.init_state(1, 9))[1], [])


def test_damaged_files_are_said_to_be(build_mini: Build, tmp_path: Path) -> None:
    model, dice = build_mini(torch.float32), random.Random(0)
    sessions = Sessions(tmp_path, model)
    engine = Engine(model, 1, 60, sessions=sessions)
    turn(engine, drawn(20))
    file = tmp_path / "talk.safetensors"
    good = file.read_bytes()
    wanted, whole = sessions.resume("talk")
    for at in (0, 7, 8, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:at])
        with pytest.raises(ValueError, match="not a saved state"):
            engine.submit([1], 1, session="talk")
    for at in [*(dice.randrange(len(good)) for _ in range(60)), *range(0, 400, 7)]:
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << dice.randrange(8)]) + good[at + 1 :])
        try:
            tokens, state = sessions.resume("talk")
        except ValueError:
            continue
        assert tokens == wanted  # a digit of max_tokens: nothing that was said
        for mine, theirs in zip(state.layers, whole.layers, strict=True):
            for a, b in zip(mine.tensors().values(), theirs.tensors().values(), strict=True):
                assert torch.equal(a[:, :20], b[:, :20])
    file.write_bytes(good)
    assert engine.idle and turn(engine, [1]).finished == "length"
    model.init_state(1, 9).save(file, model)
    with pytest.raises(ValueError, match="without its tokens"):
        sessions.open("talk")


def test_another_models_session_is_refused_and_kept(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini()
    turn(Engine(model, 1, 60, sessions=Sessions(tmp_path, model)), drawn(9))
    before = (tmp_path / "talk.safetensors").read_bytes()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    engine = Engine(model, 1, 60, sessions=Sessions(tmp_path, model))
    with pytest.raises(ValueError, match="another model"):
        engine.submit([1], 1, session="talk")
    assert (tmp_path / "talk.safetensors").read_bytes() == before


def test_weights_are_hashed_once(build_mini: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build_mini(), list[int]()
    hashed = model.fingerprint()
    monkeypatch.setattr(model, "fingerprint", lambda: calls.append(1) or hashed)
    engine = Engine(model, 1, 120, sessions=Sessions(tmp_path, model))
    for i in range(3):
        turn(engine, drawn(9, i))
    assert len(calls) == 1


@pytest.mark.parametrize("error", [OSError("No space left"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_leaves_what_was_parked(
    build_mini: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(tensors: dict[str, torch.Tensor], file: str, metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half")
        raise error

    model = build_mini()
    engine = Engine(model, 1, 120, sessions=Sessions(tmp_path, model))
    first = turn(engine, drawn(9))
    with monkeypatch.context() as patched:
        patched.setattr(state_module, "save_file", full)
        second = turn(engine, drawn(9, 1))
    assert second.finished == "length" and "No space left" in str(second.unparked)
    assert first.unparked is None and [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"]
    assert Sessions(tmp_path, model).open("talk")[0] == [*first.prompt, *first.tokens]


PARKING = """
import sys, torch, eulerstack as es
from eulerstack.inference.sessions import Sessions
from pathlib import Path
model = es.load_checkpoint(Path(sys.argv[1]))
sessions, state = Sessions(sys.argv[2], model), model.init_state(1, 512)
state.length.fill_(500)
for turn in range(10**9):
    for layer in state.layers:
        layer.map(lambda t: t.fill_(turn))
    sessions.park("talk", state, [turn] * 501)
    if turn < 3:
        print(turn, flush=True)
"""


def check_killed(checkpoint: Path, folder: Path, wait: float) -> int:
    """The turn that is parked after a process that parks without end was killed, whole."""
    command = [sys.executable, "-c", PARKING, str(checkpoint), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == "0\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
    sessions = Sessions(folder, es.load_checkpoint(checkpoint))
    tokens, state = sessions.resume("talk")
    assert len(tokens) == 501 and len(set(tokens)) == 1
    for tensors in (state.span(0, 500), state.rest()):
        assert all(bool((t == tokens[0]).all()) for t in tensors.values())
    assert [path.name for path in folder.iterdir()] == ["talk.safetensors"]
    return tokens[0]


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_9_while_parking_loses_no_session(checkpoint: Path, tmp_path: Path, kills: int) -> None:
    dice = random.Random(kills)
    turns = [check_killed(checkpoint, tmp_path, dice.uniform(0, 0.3)) for _ in range(kills)]
    assert len(turns) == kills


def test_what_a_killed_process_was_writing_goes(
    build_mini: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors writes beside the file that it is given; a kill leaves that, and all of the folder around it."""
    model = build_mini()
    sessions, state = Sessions(tmp_path, model), model.init_state(1, 120)

    def killed(tensors: dict[str, torch.Tensor], file: str, metadata: dict[str, str]) -> None:
        (Path(file).parent / ".tmpUKveH6").write_bytes(b"half")
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(state_module, "save_file", killed)
        patched.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(OSError, match="killed"):
            sessions.park("talk", state, [1])
    assert len(list(tmp_path.iterdir())) == 1
    Sessions(tmp_path, model)
    assert not list(tmp_path.iterdir())


RESUMING = """
import sys, eulerstack as es
from eulerstack.inference.engine import Engine
from eulerstack.inference.sessions import Sessions
from pathlib import Path
model = es.load_checkpoint(Path(sys.argv[1]))
engine = Engine(model, 1, 120, prefill=16, sessions=Sessions(sys.argv[2], model))
request = engine.submit([7, 8, 9], 6, session="talk", temperature=0)
while not engine.idle:
    engine.step()
print([int(token) for token in request.tokens])
"""


def test_a_conversation_goes_on_in_another_process(checkpoint: Path, tmp_path: Path) -> None:
    model = es.load_checkpoint(checkpoint)
    engine = Engine(model, 1, 120, prefill=16, sessions=Sessions(tmp_path, model))
    first = turn(engine, drawn(20))
    command = [sys.executable, "-c", RESUMING, str(checkpoint), str(tmp_path)]
    got = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert got.stdout.strip() == str(turn(engine, [*first.prompt, *first.tokens, 7, 8, 9], 6, session=None).tokens)
    assert len(Sessions(tmp_path, model).open("talk")[0]) == 20 + 5 + 3 + 6
