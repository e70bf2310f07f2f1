"""Every kind of tokenizer.json in training: documents are all their tokens, and what does not fit is said."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import eulerstack as es
from eulerstack.data.corpus import Shard, list_files, shards
from eulerstack.spec import HFTokenizer, StackSpec

from ..tokenizer_files import KINDS, TEXTS, Kind, words


def written(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return folder


def spec_of(contract: HFTokenizer, rows: int) -> StackSpec:
    builder = es.StackBuilder(d_model=16, n_heads=2, vocab_size=rows)
    return builder.set(tokenizer_contract=contract.model_dump()).add("retnet").spec()


@pytest.mark.parametrize("name", KINDS)
def test_documents_are_all_their_tokens_between_bos_and_eos(name: str, tmp_path: Path) -> None:
    kind, texts = KINDS[name], [text * 30 for text in TEXTS]
    contract, corpus = kind.saved(tmp_path).contract, written(tmp_path / "texts", texts)
    data = es.TextData(str(corpus), cache_dir=str(tmp_path / "cache"), seq_len=16, held_out=0.3)
    data._read_by(spec_of(contract, 320))
    backend, (bos, eos) = kind.make(), kind.ends()
    wanted = [[*bos, *backend.encode(text, add_special_tokens=False).ids, *eos] for text in texts]
    found = [document for one in data.shards[0].values() for document in documents(one)]
    assert sorted(found) == sorted(wanted)


def documents(shard: object) -> list[list[int]]:
    assert isinstance(shard, Shard)
    return [part.tolist() for part in np.split(shard.tokens, shard.starts[1:])]


def test_tokens_of_cut_texts_in_a_cache_are_not_used(tmp_path: Path) -> None:
    """As an earlier version left them there: it named a cache by the file with its truncation."""
    kind, corpus = KINDS["truncation"], written(tmp_path / "texts", TEXTS)
    whole = kind.saved(tmp_path)
    cut = kind.saved(tmp_path)
    cut.backend.enable_truncation(8)
    assert cut.fingerprint() != whole.fingerprint()
    lengths = []
    for tokenizer in (cut, whole):
        found = shards(list_files(corpus), tokenizer, 0.3, tmp_path / "cache")
        lengths.append(max(len(one) for shard in found.values() for one in documents(shard)))
    assert lengths[0] == 8 and lengths[1] > 40


def test_a_stack_with_fewer_rows_than_ids_is_refused_before_training(tmp_path: Path) -> None:
    contract = KINDS["holes"].saved(tmp_path).contract
    data = es.TextData(str(written(tmp_path / "texts", TEXTS)), cache_dir=str(tmp_path / "cache"), seq_len=16)
    with pytest.raises(ValueError, match="vocab_size = 11 is less than the tokenizer's 301; write vocab_size: 301"):
        data._read_by(spec_of(contract, 11))
    assert not (tmp_path / "cache").exists()


def test_a_document_that_no_token_knows_is_named(tmp_path: Path) -> None:
    def make() -> Tokenizer:
        backend = Tokenizer(models.WordLevel({"a": 0}))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return backend

    Kind(make).saved(tmp_path)
    corpus = written(tmp_path / "texts", ["a a", "a b"])
    data = es.TextData(str(corpus), tokenizer=str(tmp_path), cache_dir=str(tmp_path / "cache"), seq_len=16)
    with pytest.raises(ValueError, match=r"^1\.txt: .*tokenizer\.json cannot encode 'a b': "):
        data.setup()


def test_documents_without_tokens_are_read_over(tmp_path: Path) -> None:
    Kind(words).saved(tmp_path)
    corpus = written(tmp_path / "texts", ["the cat " * 40, " ", "\n", "on the mat " * 40])
    data = es.TextData(str(corpus), tokenizer=str(tmp_path), cache_dir=str(tmp_path / "cache"), seq_len=16)
    data.setup()
    assert sum(shard.size for shard in data.shards[0].values()) == 200
