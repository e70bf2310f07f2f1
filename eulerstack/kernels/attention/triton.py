"""Attention of a step on a GPU by Triton: one query a row over its cache, under any mask, at the memory's rate.

A cache is cut into parts so that few rows fill the device too; what the parts found is joined by what their softmaxes
divided by, as in Flash-Decoding (Dao et al. 2023). PyTorch's flash kernels take no mask, which ragged rows need.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..provider import Provider, on_triton
from . import Attending, Logits
from . import torch as reference

LEAST = 256  # slots that are worth a part of their own
PROGRAMS = 1024  # what fills a device
HEADS = 16  # query heads of a product, the fewest that tensor cores take


def cached(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, distance: Tensor | None, logits: Logits, drop: float = 0.0
) -> Tensor:
    """PyTorch's; one query a row, [B, 1, H, K], with plain logits and without gradients, by the kernel below."""
    plain = logits.plain and not drop and not torch.is_grad_enabled()
    if not plain or q.shape[1] != 1 or k.numel() == 0 or k.stride(3) != 1 or v.stride(3) != 1:
        return reference.cached(q, k, v, visible, distance, logits, drop)
    (B, S, G, K), H, V = k.shape, q.shape[2], v.shape[3]
    parts = max(1, min(triton.cdiv(S, LEAST), PROGRAMS // (B * G)))
    length = triton.cdiv(triton.cdiv(S, parts), LEAST) * LEAST
    parts = triton.cdiv(S, length)
    mixed = torch.empty(B, H, parts, V, dtype=torch.float32, device=q.device)
    total = torch.empty(B, H, parts, dtype=torch.float32, device=q.device)
    seen, slots = visible.expand(B, 1, S).contiguous(), 64 if K * k.element_size() <= 256 else 32
    _part[(B * G, parts)](
        q.contiguous(), k, v, seen, mixed, total, logits.scale, S, length, G, *k.stride()[:3], *v.stride()[:3],
        H // G, K, V, max(HEADS, triton.next_power_of_2(H // G)), slots, _padded(K), _padded(V), num_stages=3,
    )  # fmt: skip
    weights = torch.softmax(total, -1).nan_to_num(0.0)  # nothing is seen in any part
    return torch.einsum("bhp,bhpv->bhv", weights, mixed)[:, None].to(q.dtype)


def _padded(channels: int) -> int:
    return max(16, int(triton.next_power_of_2(channels)))


@triton.jit  # type: ignore[untyped-decorator]
def _part(  # type: ignore[no-untyped-def]
    q, k, v, seen, mixed, total, scale, S, length, G, k_row, k_slot, k_head, v_row, v_slot, v_head,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The R query heads of one kv head of one row over `length` slots: a mean of values, and the log of its divisor."""
    row, group, part = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    heads, keys, values = tl.arange(0, HEADS), tl.arange(0, KEYS), tl.arange(0, VALUES)
    head, mine = tl.program_id(0) * R + heads, heads < R  # H = G R: rows of heads follow each other
    asked = tl.load(q + head[:, None] * K + keys[None, :], mask=mine[:, None] & (keys < K)[None, :], other=0.0)
    k += row.to(tl.int64) * k_row + group * k_head
    v += row.to(tl.int64) * v_row + group * v_head
    top, sum_of = tl.full([HEADS], -float("inf"), tl.float32), tl.zeros([HEADS], tl.float32)
    found = tl.zeros([HEADS, VALUES], tl.float32)
    for start in range(part * length, tl.minimum(S, (part + 1) * length), SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = slot < S
        place = slot.to(tl.int64)
        key = tl.load(k + place[None, :] * k_slot + keys[:, None], mask=there[None, :] & (keys < K)[:, None], other=0.0)
        score = tl.dot(asked, key, input_precision="ieee") * scale
        shown = tl.load(seen + row * S + slot, mask=there, other=0) != 0
        score = tl.where(shown[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight, kept = tl.exp(score - base[:, None]), tl.exp(top - base)
        value = tl.load(
            v + place[:, None] * v_slot + values[None, :], mask=there[:, None] & (values < V)[None, :], other=0.0
        )
        found = found * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        sum_of, top = sum_of * kept + tl.sum(weight, 1), higher
    nothing = sum_of == 0.0
    found = found / tl.where(nothing, 1.0, sum_of)[:, None]
    out = head * tl.num_programs(1) + part
    tl.store(mixed + out[:, None] * V + values[None, :], found, mask=mine[:, None] & (values < V)[None, :])
    tl.store(total + out, tl.where(nothing, -float("inf"), top + tl.log(sum_of)), mask=mine)


PROVIDER = Provider(Attending(reference.whole, cached, reference.continued), on_triton)
