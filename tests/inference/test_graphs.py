"""On a GPU, steps are captured as graphs, and give to the bit what steps that are taken give."""

import math

import pytest
import torch

import eulerstack as es
from eulerstack.inference.steps import Steps

from .subjects import MINIS, mini

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TOKENS = 40


def on_gpu(name: str) -> es.Stack:
    """A mini with the kernels of a GPU."""
    model = es.build(mini(name).spec, device="cuda").eval()
    model.load_state_dict(mini(name).state_dict())
    return model


def told(model: es.Stack, taken: bool) -> tuple[list[torch.Tensor], Steps]:
    state, step, dice = model.init_state(3, TOKENS), Steps(model), torch.Generator("cpu").manual_seed(0)
    step.left = math.inf if taken else step.left
    found = []
    with torch.inference_mode():
        for _ in range(TOKENS - 1):
            tokens = torch.randint(0, 200, (3, 1), generator=dice, device="cpu").to("cuda")
            logits, state = step(tokens, state)
            found.append(logits.clone())
    return [*found, state.length, *(t for layer in state.layers for t in layer.tensors().values())], step


@pytest.mark.parametrize("name", MINIS)
def test_a_captured_step_is_the_step_to_the_bit(name: str) -> None:
    model = on_gpu(name)
    wanted, _ = told(model, taken=True)
    got, step = told(model, taken=False)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    experts = any("MoE" in type(m).__name__ for m in model.modules())
    assert bool(step.recorded) != experts


def test_greedy_is_what_a_full_recompute_says() -> None:
    model = on_gpu("arch_expert_research_mini")
    prompt = [3, 1, 4, 1, 5]
    out = [row[0] for row in es.generate(model, prompt, 24, temperature=0)]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + out], device="cuda"))[0, len(prompt) - 1 : -1].float()
    best, second = logits.topk(2, -1).values.unbind(-1)
    sure = best - second > 1e-3
    assert sure.any()
    assert torch.equal(logits.argmax(-1)[sure].cpu(), torch.tensor(out)[sure.cpu()])
