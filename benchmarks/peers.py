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
    return Model(f"eulerstack {name}", stack, lambda tokens: stack.losses(tokens[:, :-1], tokens[:, 1:])[0])


GATED = {"type": "gated_mlp", "mlp_ratio": HIDDEN / WIDTH}
MAMBA1, MAMBA2 = ("mamba", {"variant": "mamba1"}), ("mamba", {"d_state": STATE})
NO_FFN = {"type": "none"}
MOE = {"type": "moe", "mlp_ratio": HIDDEN / WIDTH / 2, "moe": {"experts": 8, "top_k": 2}}

OURS: dict[str, Callable[[], Model]] = {
    "attention": lambda: ours("attention", [("attention", {})] * LAYERS, GATED),
    "retnet": lambda: ours("retnet", [("retnet", {})] * LAYERS, {"type": "mlp", "mlp_ratio": 2.0}),
    "mamba1": lambda: ours("mamba1", [MAMBA1] * LAYERS, NO_FFN),
    "mamba2": lambda: ours("mamba2", [MAMBA2] * LAYERS, NO_FFN),
    "rwkv": lambda: ours("rwkv", [("rwkv", {})] * LAYERS, {"type": "mlp", "activation": "relu2"}),
    "linear": lambda: ours("linear attention", [("linear_attention", {})] * LAYERS, GATED),
    "hyena": lambda: ours("hyena", [("hyena", {})] * LAYERS, GATED),
    "tri": lambda: ours(
        "m r m a", [MAMBA2, ("retnet", {}), MAMBA2, ("attention", {})], {"type": "gated_mlp", "mlp_ratio": 1.0}
    ),
    "hybrid": lambda: ours("m m m a", [MAMBA2, MAMBA2, MAMBA2, ("attention", {})], GATED),
    "moe": lambda: ours("attention, 8 experts, 2 a token", [("attention", {})] * LAYERS, MOE),
}
"""Our models; `moe` computes what `attention` does for a token, in two experts of half the width."""


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


def hf_mamba() -> Model:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, tie_word_embeddings=True)
    return _peer("HF Mamba", MambaForCausalLM(config))


def hf_mamba2(chunk_size: int) -> Model:
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


def bamba(chunk_size: int) -> Model:
    from transformers import BambaConfig, BambaForCausalLM

    config = BambaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        attn_layer_indices=[LAYERS - 1],
        mamba_n_heads=2 * WIDTH // 64,
        mamba_d_head=64,
        mamba_d_state=STATE,
        mamba_n_groups=1,
        mamba_chunk_size=chunk_size,
        tie_word_embeddings=True,
    )
    return _peer(f"HF Bamba, chunk {chunk_size}", BambaForCausalLM(config))


def hf_rwkv() -> Model:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, context_length=1024, tie_word_embeddings=True
    )
    return _peer("HF RWKV", RwkvForCausalLM(config).train())


class MambaPy(nn.Module):
    """mambapy's layers between a tied embedding and head, as its own language model has them."""

    def __init__(self) -> None:
        from mambapy.mamba import Mamba, MambaConfig

        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.layers(self.embedding(tokens))) @ self.embedding.weight.T


def mambapy() -> Model:
    module = MambaPy()

    def loss(tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return Model("mambapy", module, loss)


PEERS: dict[str, Callable[[], Model]] = {
    "llama": llama,
    "mambapy": mambapy,
    "hf_mamba": hf_mamba,
    "hf_mamba2_64": lambda: hf_mamba2(64),
    "hf_mamba2_256": lambda: hf_mamba2(256),
    "bamba_64": lambda: bamba(64),
    "bamba_256": lambda: bamba(256),
    "hf_rwkv": hf_rwkv,
}
MODELS = OURS | PEERS


def _peer(name: str, module: nn.Module) -> Model:
    def loss(tokens: Tensor) -> Tensor:
        logits = module(input_ids=tokens[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Model(name, module.to(torch.float32), loss)
