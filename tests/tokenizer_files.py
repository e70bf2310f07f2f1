"""The kinds of tokenizer.json that people have, made by the `tokenizers` library: one table for all tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from eulerstack.spec import HFTokenizer
from eulerstack.tokens import HuggingFace

TEXTS = [
    "def f(the):\n    return the cat + the mat",
    "the cat sat on the mat. It isn't the   cat's!",
    "Ärger, ñandú, e\u0301te and 漢字 🙂🙂 the end",
    " begins with a space, ends with one ",
]


@dataclass(frozen=True)
class Kind:
    """How a file is made. bos, eos: whether the contract adds them. alters: what the file says beside its tokens."""

    make: Callable[[], Tokenizer]
    bos: bool = False
    eos: bool = False
    alters: Callable[[Tokenizer], None] = lambda _: None

    def saved(self, folder: Path) -> HuggingFace:
        backend = self.make()
        self.alters(backend)
        backend.save(str(folder / "tokenizer.json"))
        return HuggingFace(self.contract(folder))

    def contract(self, folder: Path) -> HFTokenizer:
        return HFTokenizer(type="hf", pretrained=str(folder), add_bos=self.bos, add_eos=self.eos)

    def ends(self) -> tuple[list[int], list[int]]:
        """The ids that the contract puts before and behind a document."""
        backend = self.make()
        return (
            [backend.token_to_id("<s>")] if self.bos else [],
            [backend.token_to_id("</s>")] if self.eos else [],
        )

    def decoded(self, ids: Sequence[int]) -> str:
        """What the library makes of ids, but for those that the contract puts at the ends."""
        (bos, eos), backend = self.ends(), self.make()
        return str(backend.decode([token for token in ids if token not in [*bos, *eos]]))


def numbered(*words: str) -> dict[str, int]:
    return {word: i for i, word in enumerate(words)}


def byte_level(words: Sequence[str] = ("the", "cat", "Ġthe", "Ġcat", "ðŁ", "ðŁĻĤ"), special: bool = True) -> Tokenizer:
    """GPT-2, Llama-3, Qwen: pairs of bytes; tokens may be parts of characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("c", "a"),
        ("ca", "t"),
        ("Ġ", "the"),
        ("Ġ", "cat"),
        ("ð", "Ł"),
        ("ðŁ", "ĻĤ"),
        ("Ļ", "Ĥ"),
    ]
    backend = Tokenizer(models.BPE(numbered("<s>", "</s>", *letters, "th", "ca", "ĻĤ", *words), merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if special:
        backend.add_special_tokens(["<s>", "</s>"])
    return backend


def prefixed() -> Tokenizer:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def folded() -> Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return backend


def added() -> Tokenizer:
    """Words added later, special and not, one of them with the text of another, one with a space that is stripped."""
    backend = byte_level()
    backend.add_tokens(
        [" the", "漢字", AddedToken("<sep>", lstrip=True, rstrip=True), AddedToken("mat", single_word=True)]
    )
    backend.add_special_tokens(["<|user|>", "<|end|>"])
    return backend


def templated() -> Tokenizer:
    """A file that adds BOS and EOS by itself, for transformers."""
    backend = byte_level()
    pair = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=pair
    )
    return backend


PARTS = ["th", "he", "the", "at", "an", "is"]
MERGES = [("t", "h"), ("th", "e"), ("h", "e"), ("a", "t"), ("a", "n"), ("i", "s")]
LETTERS = [chr(letter) for letter in range(33, 127)] + [*"Äéñú漢字"]


def metaspace() -> Tokenizer:
    """T5, XLM-R: a space is a letter, and one is put before the text."""
    known = numbered("<unk>", "<s>", "</s>", "\u2581", *LETTERS, *PARTS, "\u2581the")
    backend = Tokenizer(models.BPE(known, [*MERGES, ("\u2581", "the")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def unigram() -> Tokenizer:
    known = ["<unk>", "<s>", "</s>", "\u2581", *LETTERS, *PARTS, "\u2581the", "\u2581a"]
    scored = [(word, -9.0 + len(word) - i / 1000) for i, word in enumerate(known)]
    backend = Tokenizer(models.Unigram(scored, unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def byte_words() -> dict[str, int]:
    """A vocabulary of SentencePiece's: specials, the bytes, letters, and a word with and without its space."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", *"abcdefghijklmnopqrstuvwxyzA.,", "\u2581t", "he", "\u2581the", "the", "\u2581\u2581", "字"]
    return {word: i for i, word in enumerate(words)}


def byte_fallback(*ends: Any) -> Tokenizer:
    """Llama-2, Mistral, Gemma: what no token knows is written in bytes."""
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("t", "he"), ("\u2581", "\u2581")]
    backend = Tokenizer(models.BPE(byte_words(), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def unigram_bytes() -> Tokenizer:
    """A fallback whose tokens are not fused."""
    scored = [(word, -1.0 - i / 100) for word, i in byte_words().items()]
    backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def wordpiece() -> Tokenizer:
    """BERT: accents and case taken off, words put together of parts."""
    parts = [*"abcdefghijklmnopqrstuvwxyz", "the", "at", "n", "ing"]
    known = dict.fromkeys(
        ["[UNK]", "[BOS]", "[EOS]", *".,!'()+:", *parts, "cat", "begin", *(f"##{part}" for part in parts)]
    )
    backend = Tokenizer(models.WordPiece(numbered(*known), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[EOS]", 2), ("[BOS]", 1))
    backend.add_special_tokens(["[UNK]", "[BOS]", "[EOS]"])
    return backend


def words(**more: int) -> Tokenizer:
    """Whole words, and no decoder: spaces between all."""
    known = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat", ".", "end"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)} | more, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def suffixed() -> Tokenizer:
    """GPT-1, CLIP: the end of a word is marked."""
    lower = [letter for letter in LETTERS if letter == letter.lower()]
    known = numbered("<unk>", "<s>", "</s>", *lower, *(f"{letter}</w>" for letter in lower), "th", "the</w>")
    merges = [("t", "h"), ("th", "e</w>")]
    backend = Tokenizer(models.BPE(known, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def letters(decoder: Any) -> Tokenizer:
    """Wav2Vec2's letters, and other decoders over them."""
    known = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz.' "]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoder
    return backend


def holes() -> Tokenizer:
    """Eleven tokens, the largest id of which is 300."""
    return words(far=300)


def added_to_holes() -> Tokenizer:
    """The library numbers an added word by the count of those before it, and so into a hole."""
    backend = words(far=300)
    backend.add_tokens(["near"])
    return backend


KINDS = {
    "byte level": Kind(byte_level),
    "byte level, BOS and EOS": Kind(byte_level, bos=True, eos=True),
    "byte level, a space before": Kind(prefixed),
    "EOS that is not marked special": Kind(lambda: byte_level(special=False), bos=True, eos=True),
    "lower case and NFC": Kind(folded, eos=True),
    "added tokens": Kind(added),
    "a template": Kind(templated, bos=True, eos=True),
    "metaspace": Kind(metaspace, bos=True),
    "unigram": Kind(unigram, bos=True, eos=True),
    "byte fallback, a space taken off": Kind(lambda: byte_fallback(decoders.Strip(" ", 1, 0)), bos=True, eos=True),
    "byte fallback": Kind(byte_fallback),
    "byte fallback, two spaces taken off": Kind(lambda: byte_fallback(decoders.Strip(" ", 2, 0))),
    "byte fallback, not fused": Kind(unigram_bytes, eos=True),
    "byte fallback, words replaced at the end": Kind(lambda: byte_fallback(decoders.Replace("ab", "X"))),
    "WordPiece": Kind(wordpiece),
    "words": Kind(words, bos=True, eos=True),
    "ends of words marked": Kind(suffixed),
    "letters said twice": Kind(lambda: letters(decoders.CTC())),
    "letters": Kind(lambda: letters(decoders.Fuse()), eos=True),
    "letters, spaces taken off each": Kind(lambda: letters(decoders.Strip(" ", 1, 0))),
    "holes": Kind(holes, bos=True),
    "a word added into a hole": Kind(added_to_holes, eos=True),
    "truncation": Kind(byte_level, alters=lambda backend: backend.enable_truncation(8)),
    "padding": Kind(byte_level, eos=True, alters=lambda backend: backend.enable_padding(length=200, pad_id=5)),
    "dropout": Kind(byte_level, alters=lambda backend: setattr(backend.model, "dropout", 0.5)),
    "both": Kind(
        metaspace, alters=lambda backend: (backend.enable_truncation(4), backend.enable_padding(length=99))[0]
    ),
}
