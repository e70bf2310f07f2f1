"""Text to batches: every token a target once, the split by file, the order a function of the seed."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import eulerstack as es
from eulerstack.data import corpus as module
from eulerstack.data.merging import yardsticks
from eulerstack.data.splits import is_held, with_both
from eulerstack.tokens import Bytes, tokenizer_of

from ..inference.test_generate import word_tokenizer
from .conftest import QUIET


def data(corpus: Path, **options: object) -> es.TextData:
    made = es.TextData(
        str(corpus), cache_dir=str(corpus.parent / "cache"), **{"seq_len": 50, "batch_size": 3, **options}
    )  # type: ignore[arg-type]
    made.setup()
    return made


def test_files_are_sorted_listed_hashed_and_split_by_file(corpus: Path) -> None:
    files = module.list_files(corpus)
    assert [f.name for f in files] == sorted(f.name for f in files)
    assert len(files) == 20
    held = {f.name for f in files if is_held(f.name, 0.3)}
    assert 0 < len(held) < 20
    made = data(corpus, held_out=0.3)
    assert [len(made.shards[0][name].starts) for name in ("train", "held_out")] == [20 - len(held), len(held)]


def test_there_is_something_of_both() -> None:
    assert with_both(np.array([False, False])).tolist() == [False, True]
    assert with_both(np.array([True, True])).tolist() == [False, True]
    assert with_both(np.array([True, False, False])).tolist() == [True, False, False]


def test_every_token_of_every_document_is_a_target_once(corpus: Path) -> None:
    made = data(corpus)
    texts = {f.name: f.path.read_bytes() for f in module.list_files(corpus)}
    for loader in (made.val_dataloader(),):
        targets = np.concatenate([b.targets[b.targets >= 0].numpy() for b in loader])
        files = module.list_files(corpus)
        chosen = with_both(np.array([is_held(f.name, 0.02) for f in files]))
        held = [f for f, one in zip(files, chosen, strict=True) if one]
        wanted = b"".join(texts[f.name][1:] for f in held)
        assert bytes(targets.astype(np.uint8)) == wanted
        inputs = [
            (int(t), int(x)) for b in loader for t, x in zip(b.targets.flatten(), b.tokens.flatten(), strict=True)
        ]
        assert all(t == -100 or 0 <= x < 256 for t, x in inputs)


def test_windows_that_span_documents_say_so(corpus: Path) -> None:
    seen = 0
    for batch in data(corpus).train_dataloader():
        if batch.document is None:
            continue
        seen += 1
        changes = batch.document[:, 1:] != batch.document[:, :-1]
        assert (batch.targets[:, :-1][changes] == -100).all()
    assert seen > 0


def test_order_is_a_function_of_the_seed_and_can_be_resumed(corpus: Path) -> None:
    made = data(corpus, seed=5)
    loader = made.train_dataloader()
    first = [b.tokens for b in loader]
    second = [b.tokens for b in loader]
    assert all(torch.equal(a, b.tokens) for a, b in zip(first, made.train_dataloader(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for workers in (0, 2):
        half = data(corpus, seed=5, workers=workers).train_dataloader()
        got, state = [], {}
        for batch in half:
            got.append(batch.tokens)
            state = half.state_dict()
            if len(got) == 4:
                break
        rest = data(corpus, seed=9, workers=workers).train_dataloader()
        rest.load_state_dict(state)
        got += [b.tokens for b in rest]
        both = [*first, *second]
        assert len(got) == len(first) + 4
        assert all(torch.equal(a, b) for a, b in zip(got, both, strict=False))
    with pytest.raises(ValueError, match=r"data\.batch_size = 3, and this one has 4"):
        data(corpus, seed=5, batch_size=4).train_dataloader().load_state_dict(state)


def test_held_out_text_is_read_from_its_start_each_time(corpus: Path) -> None:
    loader = data(corpus, held_out=0.3).val_dataloader()
    first = next(iter(loader)).tokens
    assert torch.equal(next(iter(loader)).tokens, first)


def test_shards_are_made_once_and_again_when_a_file_changes(corpus: Path) -> None:
    cache = corpus.parent / "cache"
    data(corpus)
    (made,) = cache.iterdir()
    stamp = (made / "manifest.json").stat().st_mtime_ns
    data(corpus)
    assert (made / "manifest.json").stat().st_mtime_ns == stamp
    (corpus / "00.txt").write_text("changed")
    data(corpus)
    assert len(list(cache.iterdir())) == 2


def test_one_file_is_split_in_two(corpus: Path) -> None:
    made = data(corpus / "00.txt", held_out=0.25)
    whole = (corpus / "00.txt").read_bytes()
    tokens = np.concatenate([made.shards[0]["train"].tokens, made.shards[0]["held_out"].tokens])
    assert bytes(tokens) == whole
    assert abs(len(made.shards[0]["held_out"].tokens) / len(whole) - 0.25) < 0.02


def test_a_hugging_face_tokenizer_file(corpus: Path, tmp_path: Path) -> None:
    made = data(corpus, tokenizer=str(word_tokenizer(tmp_path)))
    shard = made.shards[0]["train"]
    assert shard.tokens.dtype == np.uint8
    assert shard.bytes_per_token > 1
    assert int(shard.tokens.max()) <= 5


def test_the_embedded_corpus_is_always_there() -> None:
    files = module.standard_library()
    assert len(files) > 300
    assert all(f.path.suffix == ".py" for f in files)
    assert not any("/test" in f"/{f.name}" for f in files)
    marks = yardsticks(f.path.read_bytes() for f in files[:40])
    assert 4 < marks["unigram entropy"] < 5
    assert 1.5 < marks["gzip -9"] < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nowhere"}, "no file and no folder"),
        ({"pattern": "*.zip"}, "holds no files"),
        ({"seq_len": 0}, "data.seq_len = 0"),
        ({"batch_size": 0}, "data.batch_size = 0"),
        ({"held_out": 1.0}, "data.held_out = 1.0"),
    ],
)
def test_what_is_no_text_is_refused(corpus: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        es.TextData(**{"path": str(corpus), "cache_dir": str(corpus.parent), **options}).setup()  # type: ignore[arg-type]


def test_a_tokenizer_beside_a_byte_stack_is_refused(corpus: Path, tmp_path: Path, stack_file: Path) -> None:
    import lightning as L

    made = es.TextData(str(corpus), tokenizer=str(word_tokenizer(tmp_path)), cache_dir=str(tmp_path / "cache"))
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match="tokenizer_contract is byte"):
        trainer.fit(es.StackModule(str(stack_file)), made)


@pytest.mark.usefixtures("lightnings_own_warnings")
def test_a_checkpoint_is_not_read_with_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    import lightning as L

    file = word_tokenizer(tmp_path)
    contract = {"type": "hf", "pretrained": str(file), "add_bos": False, "add_eos": False}
    spec = es.StackBuilder(d_model=8, n_heads=2, vocab_size=8, max_seq_len=64, tokenizer_contract=contract)
    model = es.build(spec.add("retnet").spec())
    es.save_checkpoint(model, tmp_path / "trained", tokenizer_of(model.spec.tokenizer_contract))
    (tmp_path / "other").mkdir()
    other = file.read_text().replace('cat"', 'dog"')
    (tmp_path / "other" / "tokenizer.json").write_text(other)
    for given, refused in ((None, False), (str(file), False), (str(tmp_path / "other"), True)):
        made = es.TextData(str(corpus), tokenizer=given, seq_len=16, cache_dir=str(tmp_path / "cache"))
        trainer = L.Trainer(max_steps=1, limit_val_batches=0, **QUIET)
        expected = (
            pytest.raises(ValueError, match=r"is another tokenizer than the one in .*trained") if refused else None
        )
        with expected or nullcontext():
            trainer.fit(es.StackModule(tmp_path / "trained"), made)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the checkpoint's copy of the tokenizer is the same one


def test_files_that_are_no_utf8_are_named(corpus: Path) -> None:
    (corpus / "00.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"00\.txt is no UTF-8 text"):
        data(corpus)


def test_bytes_have_their_own_number_each() -> None:
    assert Bytes().encode("aé") == [97, 195, 169]
