"""validate --report: what is right by the language and yet unlikely to be meant."""

from collections.abc import Iterator
from typing import Any

from ..costs import Estimate, estimate
from ..spec import HFTokenizer, LayerSpec, MoEFFNSpec, NoFFN, Problem, StackSpec
from ..spec.load import placed
from ..tokens import tokenizer_of

HEAD_DIMS = (32, 256)
FFN_RATIOS = (1.0, 8.0)
"""Of dense FFNs, three quarters of it for gated ones; experts may be narrower."""
KV_BYTES = 16 << 30
TARGET = 0.3
HEADED = ("attention", "retnet", "linear_attention", "branched")


def report(spec: StackSpec, file: str) -> list[Problem]:
    """Warnings of realism, each with its place in the file."""
    cost = estimate(spec)
    found = [
        *_heads(spec, cost),
        *_ratios(cost),
        *_windows(cost),
        *_sizes(spec, cost),
        *_tokens(spec),
        *_state(spec, cost),
    ]
    return sorted(placed(file, found), key=lambda p: (p.line or 0, p.column or 0))


def _warn(key: str, message: str, fix: str, value: Any = None) -> Problem:
    return Problem(key, message, fix, "Realism", value=value)


def _heads(spec: StackSpec, cost: Estimate) -> Iterator[Problem]:
    width, heads = spec.model.d_model, spec.model.n_heads
    if not any(cost.layer.mixer_type in HEADED for cost in cost.layers):
        return
    size, (low, high) = width // heads, HEAD_DIMS
    if size % 2 or not low <= size <= high:
        fix = f"choose n_heads near d_model / 64 = {max(1, round(width / 64))} or d_model / 128"
        yield _warn("model.n_heads", f"heads of {size} channels; kernels and models have 64 or 128", fix, heads)


def _templates(cost: Estimate) -> dict[str, LayerSpec]:
    return {cost.layer.template: cost.layer for cost in cost.layers}


def _ratios(cost: Estimate) -> Iterator[Problem]:
    width, (low, high) = cost.stack.spec.model.d_model, FFN_RATIOS
    for name, layer in _templates(cost).items():
        if isinstance(layer.ffn, NoFFN):
            continue
        moe = layer.ffn if isinstance(layer.ffn, MoEFFNSpec) else None
        ratio, key = layer.hidden / width, f"layer_templates.{name}.ffn"
        if not (low / 8 if moe else low) <= ratio <= high:
            yield _warn(key, f"is {ratio:g} times d_model wide; models have 2 to 4 times", "choose mlp_ratio", ratio)
        if moe is not None and moe.moe.top_k == moe.moe.experts > 1:
            message = f"every token takes all {moe.moe.experts} experts, which is dense at a higher cost"
            yield _warn(f"{key}.moe.top_k", message, "choose top_k below experts, or an ffn of type gated_mlp")


def _windows(cost: Estimate) -> Iterator[Problem]:
    limit = cost.stack.spec.model.max_seq_len
    for name, layer in _templates(cost).items():
        for key in ("window", "chunk_size"):
            size = getattr(layer.mixer, key, None)
            if size is not None and size >= limit > 1:
                where = f"layer_templates.{name}.mixer.{layer.mixer_type}.{key}"
                yield _warn(where, f"{size} is not below max_seq_len = {limit}, so it cuts nothing", "lower it", size)


def _sizes(spec: StackSpec, cost: Estimate) -> Iterator[Problem]:
    aim, count = spec.model.target_params, cost.parameters
    if aim is not None and abs(count - aim) > TARGET * aim:
        message = f"{aim:,} were aimed at, and the stack has {count:,} ({count / aim - 1:+.0%})"
        yield _warn("model.target_params", message, f"change the widths, or write {count}", aim)
    table = spec.model.vocab_size * spec.model.d_model * (1 if spec.tied else 2)
    if 2 * table > count:
        message = f"embedding and head are {table / count:.0%} of {count:,} parameters"
        yield _warn("model.vocab_size", message, "take a smaller vocabulary, or a deeper stack", spec.model.vocab_size)


def _tokens(spec: StackSpec) -> Iterator[Problem]:
    contract, vocab = spec.tokenizer_contract, spec.model.vocab_size
    if not isinstance(contract, HFTokenizer):
        size = 256
    else:
        try:
            size = tokenizer_of(contract).vocab_size
        except (ValueError, ImportError) as error:
            yield _warn("tokenizer_contract.pretrained", str(error), "have the file before `fit`", contract.pretrained)
            return
    if vocab < size:
        message = f"{vocab} is less than the tokenizer's {size}; `fit` will refuse it"
        yield _warn("model.vocab_size", message, f"write {size}", vocab)
    elif vocab > size + 127:
        yield _warn(
            "model.vocab_size",
            f"the tokenizer has {size} tokens; {vocab - size} rows serve none",
            f"write {size}",
            vocab,
        )


def _state(spec: StackSpec, cost: Estimate) -> Iterator[Problem]:
    """One row of max_seq_len tokens, against the weights and against a budget."""
    length, state = spec.model.max_seq_len, cost.state_bytes(1, spec.model.max_seq_len)
    cache = sum(state.get(kind, 0) for kind in ("KV", "latent", "history"))
    fix = "use n_kv_heads, a window, latent_dim or recurrent mixers, or a shorter max_seq_len"
    if cache > KV_BYTES:
        message = f"one row of {length:,} tokens caches {cache / 2**30:.1f} GiB"
        yield _warn("model.max_seq_len", message, fix, length)
    elif state["total"] > cost.weight_bytes:
        times = state["total"] / cost.weight_bytes
        message = f"one row of {length:,} tokens keeps {times:.1f} times the bytes of the weights"
        yield _warn("model.max_seq_len", message, fix, length)
