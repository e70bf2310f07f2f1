"""One stack from Python, run in its three forms: the logits are the same.

python examples/three_forms.py
"""

import torch

import eulerstack as es

builder = es.StackBuilder(d_model=64, n_heads=4, vocab_size=256, max_seq_len=512, name="handmade")
builder.add("mamba", {"d_state": 16}, repeat=2).add("retnet").add("attention", {"window": 64})
print(es.dump(builder.spec()))

torch.manual_seed(0)
model = builder.build().eval()
tokens = torch.randint(0, 256, (2, 100))
with torch.no_grad():
    whole = model.parallel(tokens)

    state = model.init_state(batch=2, max_tokens=128)
    first, state = model.chunkwise(tokens[:, :60], state)
    fork = state.select([1, 0])  # an independent copy with the rows swapped
    pieces = [first]
    for t in range(60, 100):
        logits, state = model.recurrent(tokens[:, t : t + 1], state)
        pieces.append(logits)

print("largest difference:", (torch.cat(pieces, 1) - whole).abs().max().item())
print("bytes of state by kind:", state.bytes_by_kind())
print("tokens seen:", state.length.tolist(), "and in the fork:", fork.length.tolist())
assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-4)
