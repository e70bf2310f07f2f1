"""The three forms on trained weights, where the mixers matter: the tri-mixer mini after some steps on real text."""

import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import eulerstack as es
from eulerstack.inference.generate import prefill

TEXT = Path(es.__file__).parent.joinpath("model.py").read_bytes()


@pytest.fixture(scope="module", params=[25, pytest.param(150, marks=pytest.mark.slow)], ids=lambda n: f"{n} steps")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> es.Stack:
    L.seed_everything(0, verbose=False)
    module = es.StackModule("arch_expert_research_mini")
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_steps=request.param, accelerator="cpu", limit_val_batches=0, enable_model_summary=False, **quiet
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, es.TextData(seq_len=128, batch_size=8, cache_dir=str(tmp_path_factory.mktemp("cache"))))
    assert trainer.callback_metrics["bits_per_byte"] < 4.5
    return module.model.eval()


def batch(rows: int, tokens: int) -> torch.Tensor:
    return torch.tensor([list(TEXT[i * 97 : i * 97 + tokens]) for i in range(rows)])


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_logits_of_the_three_forms_agree(trained: es.Stack, seed: int) -> None:
    draw, tokens = random.Random(seed), batch(2, 300)
    wanted = trained.parallel(tokens)
    state, outs, at = trained.init_state(2, 300), [], 0
    while at < 300:
        length = min(draw.choice([1, 3, 64, 65, 100]), 300 - at)
        logits, state = trained.chunkwise(tokens[:, at : at + length], state, chunk_size=draw.choice([None, 1, 7, 128]))
        outs.append(logits)
        at += length
    scale = wanted.abs().max()
    assert (torch.cat(outs, 1) - wanted).abs().max() / scale < 1e-4
    assert (trained(tokens) - wanted).abs().max() / scale < 1e-4
    state, outs = trained.init_state(2, 300), []
    for t in range(300):
        logits, state = trained.recurrent(tokens[:, t : t + 1], state)
        outs.append(logits)
    assert (torch.cat(outs, 1) - wanted).abs().max() / scale < 1e-4


@torch.no_grad()
def test_greedy_text_is_that_of_recomputing_everything(trained: es.Stack) -> None:
    """Alone and in a ragged batch, wherever the two best logits differ by more than 1e-3."""
    prompts = [list(TEXT[:90]), list(TEXT[200:203]), list(TEXT[400:431])]
    together = list(es.generate(trained, prompts, 40, temperature=0))
    for row, prompt in enumerate(prompts):
        alone = [step[0] for step in es.generate(trained, [prompt], 40, temperature=0)]
        tokens = list(prompt)
        for step in range(40):
            best = trained.parallel(torch.tensor([tokens]))[0, -1].topk(2)
            if best.values[0] - best.values[1] <= 1e-3:
                break  # from here on both ways are right
            assert alone[step] == together[step][row] == int(best.indices[0])
            tokens.append(int(best.indices[0]))
        assert len(tokens) > len(prompt) + 3


@torch.no_grad()
def test_left_and_right_padded_prompts_are_read_alike(trained: es.Stack) -> None:
    rows = [list(TEXT[:50]), list(TEXT[60:70])]
    right, _ = prefill(trained, rows)
    padded = torch.tensor([rows[0], [0] * 40 + rows[1]])
    real = torch.arange(50)[None] >= torch.tensor([[0], [40]])
    left, _ = trained.chunkwise(padded, trained.init_state(2, 50), es.Segments(real=real))
    assert (left[:, -1] - right).abs().max() / right.abs().max() < 1e-4
