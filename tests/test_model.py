"""The stack: its forms, its limits, its builder, and what it costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eulerstack as es
from eulerstack.segments import Segments

from .conftest import close

Build = Callable[..., es.Stack]


def in_pieces(
    model: es.Stack, tokens: torch.Tensor, pieces: list[int], state: es.StackState, recurrent: bool = False
) -> tuple[torch.Tensor, es.StackState]:
    outs = []
    for part in tokens.split(pieces, 1):
        logits, state = model.recurrent(part, state) if recurrent else model.chunkwise(part, state)
        outs.append(logits)
    return torch.cat(outs, 1), state


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_forms_of_the_stack_agree(build_mini: Build, dtype: torch.dtype, tolerance: float) -> None:
    model, tokens = build_mini(dtype), torch.randint(0, 256, (3, 50))
    wanted = model.parallel(tokens)
    close(model(tokens), wanted, tolerance)
    pieces, state = in_pieces(model, tokens, [17, 1, 3, 29], model.init_state(3, 50))
    close(pieces, wanted, tolerance)
    steps, other = in_pieces(model, tokens, [1] * 50, model.init_state(3, 50), recurrent=True)
    close(steps, wanted, tolerance)
    assert state.length.tolist() == other.length.tolist() == [50] * 3


def test_rows_may_stand_at_different_positions(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (2, 30))
    real = torch.arange(20)[None] < torch.tensor([20, 12])[:, None]
    _, state = model.chunkwise(tokens[:, :20], model.init_state(2, 64), Segments(real=real))
    assert state.length.tolist() == [20, 12]
    step, state = model.recurrent(tokens[:, 20:21], state)
    wanted = torch.cat([tokens[1:, :12], tokens[1:, 20:21]], 1)
    close(step[1:], model.parallel(wanted)[:, -1:], 1e-12)
    close(step[:1], model.parallel(tokens[:1, :21])[:, -1:], 1e-12)


@pytest.mark.parametrize("at", [[[19], [0]], [[3, 3, 7], [1, 2, 19]], [[], []]])
def test_logits_of_some_tokens_are_those_of_all_at_their_places(build_mini: Build, at: list[list[int]]) -> None:
    model, tokens, places = build_mini(), torch.randint(0, 256, (2, 20)), torch.tensor(at, dtype=torch.int64)
    wanted, whole = model.chunkwise(tokens, model.init_state(2, 64))
    some, state = model.chunkwise(tokens, model.init_state(2, 64), at=places)
    close(some, wanted.gather(1, places[..., None].expand(-1, -1, 256)), 1e-12)
    assert some.shape == (2, len(at[0]), 256)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), whole.tensors().values(), strict=True))


def test_packed_documents_through_the_stack(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (1, 30))
    document = torch.tensor([[7] * 11 + [3] * 19])
    logits = model(tokens, Segments(document=document))
    close(logits[:, :11], model(tokens[:, :11]), 1e-12)
    close(logits[:, 11:], model(tokens[:, 11:]), 1e-12)


def test_losses_count_what_is_a_target(build_mini: Build) -> None:
    model, tokens = build_mini(), torch.randint(0, 256, (2, 9))
    targets = torch.randint(0, 256, (2, 9))
    targets[:, 5:] = -100
    total, parts = model.losses(tokens, targets)
    wanted = torch.nn.functional.cross_entropy(model(tokens)[:, :5].flatten(0, 1), targets[:, :5].flatten())
    assert torch.allclose(total, wanted)
    assert set(parts) == {"cross_entropy"}


def test_room_runs_out_in_a_sentence(build_mini: Build) -> None:
    model = build_mini()
    state = model.init_state(2, 10)
    with pytest.raises(ValueError, match="room for 10 tokens, and these reach 11"):
        model.chunkwise(torch.zeros(2, 11, dtype=torch.int64), state)
    real = torch.arange(11)[None].expand(2, -1) < 10  # padding needs no room
    _, state = model.chunkwise(torch.zeros(2, 11, dtype=torch.int64), state, Segments(real=real))
    assert state.length.tolist() == [10, 10]
    with pytest.raises(ValueError, match="max_seq_len = 256"):
        model.init_state(1, 257)
    with pytest.raises(ValueError, match="max_seq_len = 256"):
        model(torch.zeros(1, 257, dtype=torch.int64))


def test_recurrent_stacks_have_no_longest_sequence() -> None:
    b = es.StackBuilder(d_model=32, n_heads=2, max_seq_len=8).add("mamba", {"head_dim": 8, "d_state": 4}).add("retnet")
    model = b.add("attention", {"window": 4}).build()
    tokens = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        logits, _ = in_pieces(model, tokens, [25, 15], model.init_state(1, 8))
        close(logits, model(tokens), 1e-5)


def test_a_short_state_of_a_windowed_stack_is_bounded_and_right() -> None:
    model = es.StackBuilder(d_model=32, n_heads=2).add("attention", {"window": 8}).build(dtype=torch.float64)
    tokens = torch.randint(0, 256, (1, 12))
    with torch.no_grad():
        _, state = model.chunkwise(tokens[:, :4], model.init_state(1, 5))
        with pytest.raises(ValueError, match="room for 5 tokens"):
            model.chunkwise(tokens[:, 4:], state)
        logits, _ = in_pieces(model, tokens, [4, 8], model.init_state(1, 8))
        close(logits, model.parallel(tokens), 1e-12)


def test_a_template_that_keeps_no_state_has_no_incremental_form() -> None:
    model = es.StackBuilder(d_model=32, n_heads=2).add("attention", state={"kv_cache": False}).build()
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 256)
    with pytest.raises(ValueError, match=r"layer_templates.attention.state is false"):
        model.init_state(1)


NORMS: list[dict[str, Any]] = [
    {"norm": {"type": t, "position": p}, "residual": {"type": r, "scaling": s}, "ffn": f}
    for t, p in (("rmsnorm", "pre"), ("layernorm", "post"), ("layernorm", "pre"), ("rmsnorm", "post"))
    for r, s in (("sequential", 1.0), ("parallel", 0.5))
    for f in (
        {"type": "none"},
        {"type": "mlp", "activation": "relu2", "bias": True},
        {"type": "gated_mlp", "activation": "geglu"},
    )
]


@pytest.mark.parametrize("options", NORMS, ids=str)
def test_every_way_to_norm_and_add_keeps_the_forms_equal(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    b = es.StackBuilder(d_model=16, n_heads=2, max_seq_len=64, mlp_ratio=2.0)
    model = b.add("retnet", **options).add("mamba", {"head_dim": 4, "d_state": 4}, **options).build(dtype=torch.float64)
    tokens = torch.randint(0, 256, (2, 20))
    steps, _ = in_pieces(model, tokens, [1] * 20, model.init_state(2), recurrent=True)
    close(steps, model.parallel(tokens), 1e-12)


def test_scaling_and_order_of_the_residual_act() -> None:
    logits = []
    for residual in ({"type": "sequential"}, {"type": "parallel"}, {"type": "sequential", "scaling": 0.5}):
        torch.manual_seed(0)
        model = es.StackBuilder(d_model=16, n_heads=2).add("retnet", residual=residual).build()
        logits.append(model(torch.arange(8)[None]))
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_builder_writes_what_loads_equal() -> None:
    b = es.StackBuilder(d_model=64, n_heads=4, n_kv_heads=1, vocab_size=300, max_seq_len=128, name="x")
    b.add("mamba", {"d_state": 16}, repeat=2).add("retnet", ffn={"type": "none"}).add("retnet").add(
        "mamba", {"d_state": 16}
    )
    spec = b.spec()
    assert es.loads(es.dump(spec)) == spec
    assert [layer.template for layer in es.expand(spec)] == ["mamba", "mamba", "retnet", "retnet_2", "mamba"]
    with pytest.raises(es.SpecError, match="d_stat"):
        es.StackBuilder(d_model=64, n_heads=4).add("mamba", {"d_stat": 16}).spec()


def test_providers_are_named_or_refused(build_mini: Build) -> None:
    build_mini(kernels="torch")
    with pytest.raises(ValueError, match="dtype = 'float32'"):
        build_mini("float32")
    with pytest.raises(ValueError, match="kernels='fla'"):
        build_mini(kernels="fla")


def test_same_seed_same_weights_and_names_come_from_the_spec(build_mini: Build) -> None:
    one, two = build_mini(), build_mini()
    assert [n for n, _ in one.named_parameters()] == [n for n, _ in two.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize("name", sorted(name for name in es.presets() if "_mini" in name))
def test_estimate_is_exact(name: str) -> None:
    spec = es.load(name)
    cost = es.estimate(spec)
    model = es.build(spec)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    for batch, tokens in ((1, 1), (3, 100), (2, spec.model.max_seq_len)):
        state = model.init_state(batch, tokens)
        told = cost.state_bytes(batch, tokens)
        assert told.pop("total") == state.nbytes() == sum(t.nbytes for s in state.layers for t in s.tensors().values())
        assert told == state.bytes_by_kind()


def test_a_file_a_preset_or_a_checkpoint_is_given_by_its_name(tmp_path: Path) -> None:
    spec, file = es.StackBuilder(16, 2).add("attention").spec(), tmp_path / "stack.yml"
    es.dump(spec, file)
    for name in (file, str(file)):
        assert es.build(name).spec == es.StackModule(name).spec == es.estimate(name).stack.spec == spec
        assert es.dump(name) == es.dump(spec) and es.expand(name) == es.expand(spec)
    assert es.build("arch_expert_research_mini", "meta").spec == es.load("arch_expert_research_mini")
    es.save_checkpoint(es.build(spec), tmp_path / "made")
    assert es.estimate(tmp_path / "made").parameters == es.estimate(spec).parameters
    assert es.dump(tmp_path / "made") == es.dump(spec)
    with pytest.raises(
        ValueError, match=r"made is a checkpoint, and build draws fresh weights: write load_checkpoint\("
    ):
        es.build(tmp_path / "made")
    for reads in (es.build, es.estimate, es.dump, es.expand, es.StackModule):
        with pytest.raises(es.SpecError, match="there is no such file"):
            reads("stack.yml")
        with pytest.raises(ValueError, match="spec is a dict: give a StackSpec, a YAML file"):
            reads({"model": {}})  # type: ignore[arg-type]


def test_a_stack_that_keeps_no_state_costs_none() -> None:
    b = es.StackBuilder(d_model=32, n_heads=2).add("attention", state={"kv_cache": False}).add("retnet")
    assert set(es.estimate(b.spec()).state_bytes(1, 10)) == {"retention", "total"}


def test_flops_count_the_matrix_products() -> None:
    """Against PyTorch's own counter, where it can count: a stack of attention alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = es.StackBuilder(d_model=64, n_heads=4).add("attention", repeat=2).build()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 128, dtype=torch.int64))
    counted = counter.get_total_flops()
    assert 0.7 < model.flops(128) / counted <= 1.01  # the counter counts the masked half of the scores too


@pytest.mark.parametrize("span", [1, 16, 23])
@pytest.mark.parametrize("packed", [False, True])
def test_long_sequences_pass_a_layer_in_spans(span: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = es.build(es.load("presets/every_mixer_mini.yml"), dtype=torch.float64)
    tokens, targets = torch.randint(0, 256, (2, 2, 70))
    document = torch.tensor([[0] * 30 + [1] * 40, [2] * 70])
    segments = Segments(real=torch.arange(70).expand(2, -1) < 66, document=document) if packed else None
    found = []
    for size in (1000, span):
        monkeypatch.setattr("eulerstack.block.SPAN", size)
        total, parts = model.losses(tokens, targets, segments)
        logits, state = model.chunkwise(tokens, model.init_state(2, 70), segments)
        leaves = [logits, total, *torch.autograd.grad(total, list(model.parameters()), allow_unused=True)]
        found.append([*leaves, *parts.values(), *(t for layer in state.layers for t in layer.tensors().values())])
    for whole, spans in zip(*found, strict=True):
        assert (whole is None) == (spans is None)
        if whole is not None:
            close(spans, whole, 1e-10)
