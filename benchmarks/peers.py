"""The models that are timed: ours, and the peers of Hugging Face at the same widths and sizes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import eulerstack as es

WIDTH, LAYERS, HEADS, VOCAB = 256, 4, 4, 256
HIDDEN = 688  # Llama's 8/3 of the width, rounded up as it does
STATE = 128


@dataclass
class Model:
    """A model and its loss over tokens [B, T]."""

    name: str
    module: nn.Module
    loss: Callable[[Tensor], Tensor]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def ours(name: str, mixers: list[tuple[str, dict[str, object]]], ffn: dict[str, object]) -> Model:
    builder = es.StackBuilder(d_model=WIDTH, n_heads=HEADS, vocab_size=VOCAB, max_seq_len=1 << 15)
    for mixer, options in mixers:
        builder.add(mixer, options, ffn=ffn)
    stack = builder.build()
    return Model(name, stack, lambda tokens: stack.losses(tokens[:, :-1], tokens[:, 1:])[0])


def twins() -> dict[str, Model]:
    gated = {"type": "gated_mlp", "mlp_ratio": HIDDEN / WIDTH}
    mamba = ("mamba", {"d_state": STATE})
    return {
        "attention": ours("eulerstack attention", [("attention", {})] * LAYERS, gated),
        "retnet": ours("eulerstack retnet", [("retnet", {})] * LAYERS, {"type": "mlp", "mlp_ratio": 2.0}),
        "mamba2": ours("eulerstack mamba2", [mamba] * LAYERS, {"type": "none"}),
        "tri": ours(
            "eulerstack m r m a", [mamba, ("retnet", {}), mamba, ("attention", {})], {**gated, "mlp_ratio": 1.0}
        ),
    }


def llama() -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=1 << 15,
        tie_word_embeddings=True,
    )
    return _peer("HF Llama", LlamaForCausalLM(config))


def mamba2(chunk_size: int = 256) -> Model:
    """256 is the library's default chunk; at 64 it is at its fastest on a CPU."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        state_size=STATE,
        num_hidden_layers=LAYERS,
        num_heads=2 * WIDTH // 64,
        head_dim=64,
        expand=2,
        n_groups=1,
        chunk_size=chunk_size,
        tie_word_embeddings=True,
    )
    return _peer(f"HF Mamba2, chunk {chunk_size}", Mamba2ForCausalLM(config))


def _peer(name: str, module: nn.Module) -> Model:
    def loss(tokens: Tensor) -> Tensor:
        logits = module(input_ids=tokens[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Model(name, module.to(torch.float32), loss)
