"""What stands around the layers: the embedding's scale, the soft-capped head, and modules that look further ahead."""

import pytest
import torch
from torch.nn import functional as F

import eulerstack as es
from eulerstack.segments import IGNORED, Segments

from .conftest import close

FILE = """
schema_version: 1
model: {name: t, d_model: 32, n_heads: 4, vocab_size: 256, max_seq_len: 64, mlp_ratio: 1.0}
tokenizer_contract: {type: byte}
embedding: {type: learned}
layer_templates:
  r: {mixer: {type: retnet}, ffn: {type: mlp}}
  a: {mixer: {type: attention}, ffn: {type: gated_mlp}}
  e: {mixer: {type: retnet}, ffn: {type: moe, moe: {experts: 4, top_k: 2, bias_correction: {enabled: true}}}}
layer_schedule: [{pattern: r a e}]
head: {type: causal_lm}
"""
MTP = "head: {type: causal_lm_mtp, mtp: {n_predict: 2, head_template: %s, train_loss_weight: 0.5}}"


def stack(before: str = "", after: str = "") -> es.Stack:
    torch.manual_seed(3)
    assert before in FILE
    return es.build(es.loads(FILE.replace(before, after)), dtype=torch.float64)


def looking_ahead(template: str = "a") -> es.Stack:
    return stack("head: {type: causal_lm}", MTP % template)


def batch(rows: int = 2, tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(0, 256, (rows, tokens + 1))
    return text[:, :-1], text[:, 1:]


def test_logits_are_soft_capped_in_all_forms() -> None:
    plain, capped = stack(), stack("causal_lm}", "causal_lm, logit_softcap: 0.01}")
    tokens = batch()[0]
    wanted = 0.01 * torch.tanh(plain(tokens) / 0.01)
    assert wanted.abs().max() > 0.009
    close(capped(tokens), wanted, 1e-12)
    close(capped.chunkwise(tokens, capped.init_state(2, 12))[0], wanted, 1e-12)


def test_embeddings_are_scaled_in_all_forms() -> None:
    plain, scaled = stack(), stack("{type: learned}", "{type: learned, scale: 5.5, tie_word_embeddings: false}")
    scaled.load_state_dict(plain.state_dict() | {"head.weight": plain.embedding.weight})
    tokens = batch()[0]
    with torch.no_grad():
        plain.head = torch.nn.Linear(32, 256, bias=False, dtype=torch.float64)
        plain.head.weight.copy_(scaled.head.weight)
        plain.embedding.weight.copy_(plain.embedding.weight * 5.5)
    close(scaled(tokens), plain(tokens), 1e-12)
    close(scaled.chunkwise(tokens, scaled.init_state(2, 12))[0], plain(tokens), 1e-12)


def test_modules_look_further_ahead_as_the_paper_has_it() -> None:
    model = looking_ahead()
    tokens, targets = batch()
    seen = {}
    model.norm.register_forward_hook(lambda module, args, out: seen.setdefault("h", args[0]))
    total, parts = model.losses(tokens, targets)
    h, losses = seen["h"], []
    for steps, module in enumerate(model.ahead, 1):
        length = tokens.shape[1] - steps
        e = model.embedding(tokens[:, steps:])
        h = module.proj(torch.cat([module.stream_norm(h[:, :length]), module.token_norm(e)], -1))
        h, _ = module.layers[0](h, Segments.dense(length))
        logits = module.norm(h) @ model.embedding.weight.T
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets[:, steps:].flatten()))
    wanted = 0.5 * (losses[0] + losses[1]) / 2
    close(parts["multi_token"].reshape(1), wanted.reshape(1), 1e-12)
    close(total.reshape(1), (parts["cross_entropy"] + wanted + parts["load_balance"] + parts["router_z"])[None], 1e-12)


@pytest.mark.parametrize("template", ["a", "r", "e"])
def test_packed_and_padded_documents_do_not_see_each_other(template: str) -> None:
    model, text = looking_ahead(template), torch.randint(0, 256, (21,))
    cuts = [(0, 9), (9, 10), (10, 21)]
    document, targets = torch.empty(1, 21, dtype=torch.int64), torch.full((1, 21), IGNORED)
    for number, (a, b) in enumerate(cuts):
        document[0, a:b] = number
        targets[0, a : b - 1] = text[a + 1 : b]
    tokens, targets, document = (
        F.pad(x, (3, 2), value=v) for x, v in ((text[None], 7), (targets, IGNORED), (document, 9))
    )
    real = F.pad(torch.ones(1, 21, dtype=torch.bool), (3, 2))
    packed = model.losses(tokens, targets, Segments(real=real, document=document))[1]["multi_token"]
    alone = torch.stack([summed(model, text[a:b]) for a, b in cuts]).sum(0)
    counts = torch.tensor([sum(max(b - a - 1 - steps, 0) for a, b in cuts) for steps in (1, 2)])
    close(packed[None], 0.5 * (alone / counts).mean()[None], 1e-12)


def summed(model: es.Stack, text: torch.Tensor) -> torch.Tensor:
    """[2] what each module's losses over one document add up to."""
    outputs: list[torch.Tensor] = []
    hooks = [m.norm.register_forward_hook(lambda module, args, out: outputs.append(out)) for m in model.ahead]
    model.losses(text[None, :-1], text[None, 1:])
    for hook in hooks:
        hook.remove()
    scores = [
        out[0, : max(len(text) - 1 - steps, 0)] @ model.embedding.weight.T for steps, out in enumerate(outputs, 1)
    ]
    return torch.stack([F.cross_entropy(s, text[steps + 1 :], reduction="sum") for steps, s in enumerate(scores, 1)])


def test_the_modules_learn_and_inference_does_without_them() -> None:
    model = looking_ahead("e")
    tokens, targets = batch()
    total, parts = model.losses(tokens, targets)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.ahead.parameters() if p.requires_grad)
    assert {"router_load/2", "router_load/3", "router_load/4"} <= set(parts)
    bias = model.ahead[1].layers[0].ffn.correction.bias.clone()
    model.rebalance({4: parts["router_load/4"]})
    assert not torch.equal(bias, model.ahead[1].layers[0].ffn.correction.bias)
    plain = stack()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("ahead.") for name in unexpected)
    close(model(tokens), plain(tokens), 1e-12)
    cost, without = es.estimate(model.spec), es.estimate(plain.spec)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.active_parameters == without.active_parameters
    assert model.flops(12) == plain.flops(12) < model.flops(12, training=True)


def test_rows_shorter_than_the_look_ahead_add_nothing() -> None:
    model = looking_ahead()
    tokens, targets = batch(2, 1)
    assert model.losses(tokens, targets)[1]["multi_token"].item() == 0
