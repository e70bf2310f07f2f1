"""Lines of JSON, label masks, packed rows, and token shards that were changed on the disk."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import eulerstack as es
from eulerstack.data.packing import first_fit, pieces
from eulerstack.training.data import Batch

from .conftest import in_order

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {"window": 5}),
    "latent": ("attention", {"latent_dim": 8}),
    "retnet": ("retnet", {"chunk_size": 8}),
    "linear_attention": ("linear_attention", {"chunk_size": 8}),
    "mamba1": ("mamba", {"variant": "mamba1", "d_state": 4, "chunk_size": 8}),
    "mamba2": ("mamba", {"d_state": 8, "head_dim": 4, "chunk_size": 8}),
    "rwkv": ("rwkv", {}),
    "hyena": ("hyena", {"filter_hidden": 8}),
    "gated retnet": ("retnet", {"gamma": "gated", "chunk_size": 8}),
    "sinks": ("attention", {"attention_sinks": {"n_per_head": 2}, "qk_norm": True}),
    "branched": (
        "branched",
        {
            "branches": {
                "a": {"type": "attention"},
                "m": {"type": "mamba", "mamba": {"d_state": 8, "head_dim": 4, "chunk_size": 8}},
                "r": {"type": "retnet", "retnet": {"gamma": "learned", "chunk_size": 8}},
            },
            "selector": {"type": "learned_gate"},
        },
    ),
}


def lines(folder: Path, *values: object) -> Path:
    """A .jsonl file; strings are written as they are."""
    file = folder / "lines.jsonl"
    file.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return file


def data(path: Path, **options: Any) -> es.TextData:
    made = es.TextData(
        str(path), cache_dir=str(path.parent / "cache"), **{"seq_len": 24, "batch_size": 4, "seed": 3, **options}
    )
    made.setup()
    return made


def ragged(folder: Path, key: str = "text") -> Path:
    """Forty documents of 2 to 25 bytes."""
    return lines(folder, *({key: (f"{i} is " * 9)[: 2 + 7 * i % 24]} for i in range(40)))


def documents(made: es.TextData, split: str) -> list[bytes]:
    shard = made.shards[0][split]
    return [bytes(part) for part in np.split(shard.tokens, shard.starts[1:])]


def test_each_line_is_a_document(tmp_path: Path) -> None:
    made = data(
        lines(tmp_path, {"body": "one"}, "", {"body": "zwei ä", "prompt": 1}, {"body": "three"}), text_key="body"
    )
    assert sorted(documents(made, "train") + documents(made, "held_out")) == [b"one", b"three", "zwei ä".encode()]


def test_lines_and_text_files_in_one_folder(corpus: Path) -> None:
    before = data(corpus)
    ragged(corpus)
    after = data(corpus)
    count = sum(len(shard.starts) for shard in before.shards[0].values())
    assert sum(len(shard.starts) for shard in after.shards[0].values()) == count + 40


def test_bad_lines_are_counted_and_said_once_a_run(tmp_path: Path) -> None:
    file = lines(
        tmp_path, {"text": "one"}, {"text": "two"}, "{", {"text": 3}, {"other": ""}, "[1]", '{"text": "\\ud800"}'
    )
    for _ in range(2):  # read, and from the cache
        with pytest.warns(
            UserWarning, match=r"skipped 5 of 7 lines of .*lines\.jsonl: first at line 3: it is no JSON$"
        ):
            made = data(file)
    assert sum(len(shard.starts) for shard in made.shards[0].values()) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "first at line 1: it is no JSON;"),
        ("[" * 100_000, "it is no JSON;"),
        ({"txt": "a"}, "it has no key 'text'"),
        ({"text": None}, "its 'text' is no string"),
        ({"text": ""}, "its 'text' is empty"),
        ({"prompt": "a", "completion": ""}, "its 'completion' is empty"),
        ("\n", "has no line to train on; write an object a line"),
        ({"prompt": "a", "completion": "b"}, "give two lines or more"),
    ],
)
def test_a_file_without_a_line_to_train_on_is_refused(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(lines(tmp_path, line))


def test_lines_that_are_no_utf8_are_skipped(tmp_path: Path) -> None:
    file = ragged(tmp_path)
    file.write_bytes(file.read_bytes() + b'{"text": "\xff"}\n')
    with pytest.warns(UserWarning, match="first at line 41: it is no UTF-8 text"):
        data(file)


@pytest.mark.parametrize("packing", ["cut", "packed"])
def test_a_prompts_tokens_are_no_targets(tmp_path: Path, packing: str) -> None:
    pairs = [{"prompt": "?" * (i % 5), "completion": "=" * (1 + i % 7)} for i in range(30)]
    made = data(lines(tmp_path, *pairs), packing=packing, held_out=0.3)
    learned = 0
    for split in ("train", "held_out"):
        for batch in in_order(made, split):
            assert set(batch.targets.unique().tolist()) <= {-100, ord("=")}
            learned += int((batch.targets == ord("=")).sum())
    # without a prompt, the first token has nothing before it
    assert learned == sum(len(p["completion"]) - (not p["prompt"]) for p in pairs)
    assert made.shards[0]["train"].bytes_per_token == 1.0


def test_pieces_hold_every_target_once_and_rows_hold_what_fits() -> None:
    sizes = np.random.default_rng(0).integers(1, 60, 500)
    starts = sizes.cumsum() - sizes
    begin, end = pieces(starts, int(sizes.sum()), 16)
    covered = np.concatenate([np.arange(b + 1, e) for b, e in zip(begin, end, strict=True)])
    assert np.array_equal(np.sort(covered), np.setdiff1d(np.arange(sizes.sum()), starts))
    whole = sizes <= 17
    assert set(zip(starts[whole], (starts + sizes)[whole], strict=True)) <= set(zip(begin, end, strict=True))
    row = first_fit(end - begin, 17)
    filled = np.bincount(row, weights=end - begin)
    assert filled.min() > 0
    assert filled.max() <= 17
    assert filled.mean() > 0.9 * 17


def test_packed_rows_hold_whole_documents(tmp_path: Path) -> None:
    made = data(ragged(tmp_path), packing="packed")
    found: list[bytes] = []
    rows = made.train_dataloader().rows
    for row in map(rows.__getitem__, range(len(rows))):
        tokens, owner = row.tokens, row.document
        found += [bytes(tokens[owner == one].astype(np.uint8)) for one in np.unique(owner)]
    assert sorted(found) == sorted(documents(made, "train"))


def gradients(model: es.Stack, loss: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads, strict=True)]


def total(model: es.Stack, batch: Batch) -> Tensor:
    """The sum of the losses of all targets."""
    _, parts = model.losses(batch.tokens, batch.targets, batch.segments())
    return parts["cross_entropy"] * (batch.targets != -100).sum()


def check_packed_equals_alone(model: es.Stack, folder: Path) -> None:
    """The packed batch of ragged documents against the documents one by one."""
    made = data(ragged(folder), packing="packed", batch_size=64)
    (batch,) = in_order(made, "train")
    assert batch.document is not None
    packed = total(model, batch)
    alone = []
    for text in documents(made, "train"):
        ids = torch.tensor(list(text))[None]
        alone.append(total(model, Batch(ids[:, :-1], ids[:, 1:], None, 1.0)))
    torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients(model, packed), gradients(model, torch.stack(alone).sum()), strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_train_as_they_would_alone(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
    spec = es.StackBuilder(**model, vocab_size=256).add(*KINDS[kind]).spec()
    check_packed_equals_alone(es.build(spec, dtype=torch.float64), tmp_path)


@pytest.mark.parametrize("width", [64, pytest.param(None, marks=pytest.mark.slow)], ids=["narrow", "as it is"])
@pytest.mark.parametrize("name", ["arch_expert_research_mini", "every_mixer_mini"])
def test_packed_documents_train_a_preset_as_they_would_alone(tmp_path: Path, name: str, width: int | None) -> None:
    torch.manual_seed(0)
    settings = [] if width is None else [f"model.d_model={width}"]
    check_packed_equals_alone(es.build(es.load(name, settings), dtype=torch.float64, kernels="torch"), tmp_path)


def test_packed_order_is_a_function_of_the_seed_and_can_be_resumed(tmp_path: Path) -> None:
    made = data(ragged(tmp_path), packing="packed")
    loader = made.train_dataloader()
    both = [b.tokens for _ in range(2) for b in loader]
    for workers in (0, 2):
        half = data(ragged(tmp_path), packing="packed", workers=workers).train_dataloader()
        got = []
        for batch in half:
            got.append(batch.tokens)
            if len(got) == 2:
                break
        rest = data(ragged(tmp_path), packing="packed", workers=workers, seed=9).train_dataloader()
        rest.load_state_dict(half.state_dict())
        got += [b.tokens for b in rest]
        assert all(torch.equal(a, b) for a, b in zip(got, both, strict=False))
    cut = data(ragged(tmp_path)).train_dataloader()
    with pytest.raises(ValueError, match=r"data\.(packing = packed|windows = )"):
        cut.load_state_dict(half.state_dict() | {"windows": len(cut.rows)})


@pytest.mark.parametrize("name", ["train/tokens.npy", "train/starts.npy", "held_out/given.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_shard_is_made_again(corpus: Path, name: str, damage: str) -> None:
    whole = documents(data(corpus), "train")
    (folder,) = (corpus.parent / "cache").iterdir()
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[:-5] if damage == "truncated" else content[:-5] + b"\x01" * 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert documents(data(corpus), "train") == whole
    silent = (name, damage) == ("manifest.json", "missing")  # as after a run that was killed
    assert [str(w.message).endswith("they are made again") for w in said] == [True] * (not silent)
    assert (folder / name).read_bytes() == content
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"packing": "tight"}, "data.packing = 'tight' must be one of cut, packed"),
        ({"text_key": ""}, "data.text_key is"),
    ],
)
def test_unknown_options_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        es.TextData("x", **option)
