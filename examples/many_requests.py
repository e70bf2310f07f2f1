"""An engine serves many requests at once; prompts that begin alike are read once, a conversation rests on disk.

python examples/many_requests.py
"""

from tempfile import TemporaryDirectory

import torch

import eulerstack as es

torch.manual_seed(0)
model = es.build(es.load("arch_expert_research_mini")).eval()
instructions = list(b"def add(a, b):\n    return a + b\n\n" * 12)

with TemporaryDirectory() as folder:
    engine = es.Engine(model, slots=4, max_tokens=1024, prefix_bytes=1 << 28, sessions=es.Sessions(folder, model))
    requests = [engine.submit([*instructions, *f"def f{i}(".encode()], 12, temperature=0.8, seed=i) for i in range(6)]
    while not engine.idle:
        for request in engine.step():
            if request.finished:
                print(f"request {requests.index(request)}: {request.finished}, {request.tokens}")
    store = engine.prefixes
    assert store is not None
    print(f"{store.tokens_reused} of {sum(len(r.prompt) for r in requests)} tokens of the prompts were not read again")

    for turn in (b"def first(", b"def second("):
        request = engine.submit(list(turn), 8, temperature=0, session="mine")
        while not engine.idle:
            engine.step()
    print(f"the session has {len(es.Sessions(folder, model).open('mine')[0])} tokens")

state = model.init_state(1, max_tokens=200)
tape = es.Tape(model, state, every=16, keep=2)
with torch.no_grad():
    before = tape.chunkwise(torch.tensor([instructions[:100]]))[:, -1]
    tape.chunkwise(torch.randint(0, 256, (1, 10)))
    tape.rollback(11)
    again = tape.chunkwise(torch.tensor([instructions[99:100]]))[:, -1]
assert torch.allclose(before, again, atol=1e-4)
print("ten tokens were taken back, in a stack of Mamba, RetNet and attention")
