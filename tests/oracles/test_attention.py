"""Attention against transformers' modules with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulerstack as es
from eulerstack.layers.rope import alibi_slopes
from eulerstack.mixers import Mixer, make_mixer
from eulerstack.segments import Segments
from eulerstack.spec import expand

from ..conftest import close

pytest.importorskip("transformers")

WIDTH, HEADS, KV_HEADS, TOKENS, LONGEST = 64, 4, 2, 50, 256


def ours(attention: dict[str, Any], embedding: dict[str, Any] | None = None) -> Mixer[Any]:
    torch.manual_seed(0)
    builder = es.StackBuilder(WIDTH, HEADS, n_kv_heads=KV_HEADS, max_seq_len=LONGEST, embedding=embedding)
    spec = builder.add("attention", attention).spec()
    mixer = make_mixer(expand(spec)[0].mixer, spec)
    mixer.reset_parameters()
    with torch.no_grad():
        for name, weight in mixer.named_parameters():
            weight.mul_(3.0) if name.endswith("proj.weight") else weight.add_(torch.randn_like(weight))
    return mixer


def mask(window: int | None = None) -> Tensor:
    """Additive, [1, 1, T, T]."""
    far = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    hidden = (far < 0) | (far >= (window or TOKENS))
    return torch.zeros(TOKENS, TOKENS).masked_fill(hidden, -torch.inf)[None, None]


def copy(peer: nn.Module, mixer: nn.Module, names: dict[str, str] | None = None) -> None:
    """The mixer's weights in the peer; `names` says which of the peer's are called otherwise."""
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            weight.copy_(mixer.get_parameter((names or {}).get(name, name)).reshape(weight.shape))


def forms(mixer: Mixer[Any], x: Tensor) -> list[Tensor]:
    """The parallel form, chunks, and single steps."""
    chunked = mixer.chunkwise(x, mixer.init_state(2, TOKENS), Segments.dense(TOKENS), chunk_size=13)[0]
    state, outs = mixer.init_state(2, TOKENS), []
    for t in range(TOKENS):
        y, state = mixer.recurrent(x[:, t : t + 1], state, Segments.dense(1, t))
        outs.append(y)
    return [mixer.parallel(x), chunked, torch.cat(outs, 1)]


def agree(mixer: Mixer[Any], peer: nn.Module, rotary: nn.Module, hidden: Tensor) -> None:
    x = torch.randn(2, TOKENS, WIDTH)
    turn = rotary(x, torch.arange(TOKENS)[None])
    with torch.no_grad():
        wanted = peer(hidden_states=x, position_embeddings=turn, attention_mask=hidden)[0]
        for y in forms(mixer, x):
            close(y, wanted, 1e-5)


SCALINGS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "plain": (None, {"rope_type": "default"}),
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        {"type": "yarn", "factor": 8.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": LONGEST // 8},
    ),
    "yarn, original length": (
        {"type": "yarn", "factor": 4.0, "original_max_seq_len": 100},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
    ),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_llama_with_grouped_queries_and_scaled_rotation(scaling: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    mine, theirs = SCALINGS[scaling]
    embedding = {"type": "learned", "rope_theta": 500.0, **({"rope_scaling": mine} if mine else {})}
    mixer = ours({"qkv_bias": False}, embedding)
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_theta": 500.0, **theirs},
        attn_implementation="eager",
    )
    peer = LlamaAttention(config, 0)
    copy(peer, mixer)
    agree(mixer, peer, LlamaRotaryEmbedding(config), mask())


def test_ntk_scaling_raises_theta() -> None:
    """NTK-aware scaling is plain rotation at theta * factor^(d / (d - 2))."""
    head = WIDTH // HEADS
    scaled = ours({}, {"type": "learned", "rope_theta": 100.0, "rope_scaling": {"type": "ntk", "factor": 4.0}})
    plain = ours({}, {"type": "learned", "rope_theta": 100.0 * 4.0 ** (head / (head - 2))})
    x = torch.randn(2, TOKENS, WIDTH)
    close(scaled.parallel(x), plain.parallel(x), 1e-5)


@pytest.mark.parametrize("window", [None, 7])
def test_gemma2_with_soft_cap_and_window(window: int | None) -> None:
    from transformers import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding

    mixer = ours({"logit_softcap": 1.5, "window": window} if window else {"logit_softcap": 1.5})
    config = Gemma2Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH // HEADS,
        query_pre_attn_scalar=WIDTH // HEADS,
        attn_logit_softcapping=1.5,
        attn_implementation="eager",
    )
    peer = Gemma2Attention(config, 0)
    copy(peer, mixer)
    agree(mixer, peer.eval(), Gemma2RotaryEmbedding(config), mask(window))


@pytest.mark.parametrize("window", [None, 7])
def test_gpt_oss_with_sinks(window: int | None) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    mixer = ours({"attention_sinks": {}, "qkv_bias": True, **({"window": window} if window else {})})
    config = GptOssConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_bias=True,
        attn_implementation="eager",
    )
    peer = GptOssAttention(config, 0)
    peer.o_proj.bias = None  # ours has none
    copy(peer, mixer, {"sinks": "logits.learned.sinks"})
    agree(mixer, peer.eval(), GptOssRotaryEmbedding(config), mask(window))


def test_qwen3_with_normed_heads() -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    mixer = ours({"qk_norm": True})
    config = Qwen3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH // HEADS,
        rms_norm_eps=1e-6,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    peer = Qwen3Attention(config, 0)
    copy(peer, mixer)
    agree(mixer, peer.eval(), Qwen3RotaryEmbedding(config), mask())


def test_deepseek_with_latents() -> None:
    """Multi-head latent attention: transformers expands the latents, as our parallel form does; steps absorb."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    head, latent, rotated = WIDTH // HEADS, 24, 8
    mixer = ours({"latent_dim": latent, "rope_head_dim": rotated})
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=latent,
        qk_rope_head_dim=rotated,
        qk_nope_head_dim=head,
        v_head_dim=head,
        rope_interleave=False,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    peer = DeepseekV3Attention(config, 0)
    with torch.no_grad():
        k, v = (mixer.get_parameter(f"{n}_proj.weight").unflatten(0, (HEADS, head)) for n in "kv")
        peer.kv_b_proj.weight.copy_(torch.cat([k, v], 1).flatten(0, 1))
        peer.q_proj.weight.copy_(mixer.get_parameter("q_proj.weight"))
        peer.o_proj.weight.copy_(mixer.get_parameter("o_proj.weight"))
        peer.kv_a_proj_with_mqa.weight.copy_(mixer.get_parameter("latent_proj.weight"))
        peer.kv_a_layernorm.weight.copy_(mixer.get_parameter("latent_norm.weight"))
    agree(mixer, peer.eval(), DeepseekV3RotaryEmbedding(config), mask())


@pytest.mark.parametrize("heads", [1, 4, 8, 6, 12, 20])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 9), heads, torch.float64)[:, 0]  # slope * position
    close(torch.tensor(alibi_slopes(heads), dtype=torch.float64), theirs[:, 1], 1e-6)


@pytest.mark.parametrize("window", [None, 7])
def test_alibi_against_the_formula(window: int | None) -> None:
    mixer = ours({"window": window} if window else {}, {"type": "learned", "positional": "alibi"})
    x, head = torch.randn(2, TOKENS, WIDTH), WIDTH // HEADS
    q, k, v = (mixer.get_submodule(f"{n}_proj")(x).unflatten(-1, (-1, head)).transpose(1, 2) for n in "qkv")
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    far = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    scores = (
        q @ k.mT / head**0.5 - torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])[:, None, None] * far
    )
    y = (scores + mask(window)).softmax(-1) @ v
    wanted = mixer.get_submodule("o_proj")(y.transpose(1, 2).flatten(2))
    for got in forms(mixer, x):
        close(got, wanted, 1e-5)
