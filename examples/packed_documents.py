"""Padding and packed documents are one concept: Segments.

python examples/packed_documents.py
"""

import torch

import eulerstack as es

torch.manual_seed(0)
model = es.build(es.load("arch_expert_research_mini")).eval()
one, two = torch.randint(0, 256, (1, 30)), torch.randint(0, 256, (1, 50))

with torch.no_grad():
    packed = model(torch.cat([one, two], 1), es.Segments(document=torch.tensor([[0] * 30 + [1] * 50])))
    padded = torch.zeros(2, 50, dtype=torch.int64)
    padded[0, 20:], padded[1] = one[0], two[0]
    real = torch.arange(50)[None] >= torch.tensor([[20], [0]])
    batched = model(padded, es.Segments(real=real))
    alone = [model(one), model(two)]

print("packed against alone:", (packed[:, 30:] - alone[1]).abs().max().item())
print("left-padded against alone:", (batched[:1, 20:] - alone[0]).abs().max().item())
assert torch.allclose(packed[:, 30:], alone[1], atol=1e-4)
assert torch.allclose(batched[:1, 20:], alone[0], atol=1e-4)
