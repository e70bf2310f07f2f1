"""Speculative decoding writes what the model alone would, however bad the draft."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import eulerstack as es
from eulerstack.cli.main import cli
from eulerstack.inference.generate import prefill
from eulerstack.inference.sampling import Sampler, Token
from eulerstack.inference.speculation import Speculation
from eulerstack.inference.tape import Tape

from ..conftest import close
from .test_generate import PROMPTS, recomputed, written
from .test_tape import told

Build = Callable[..., es.Stack]


def scaled(model: es.Stack, scale: float = 2.0) -> es.Stack:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.mul_(scale)
    return model


def drafts(of: es.Stack) -> dict[str, es.Stack]:
    torch.manual_seed(1)
    hybrid = es.StackBuilder(d_model=16, n_heads=2, max_seq_len=256, mlp_ratio=1.0)
    hybrid.add("mamba", {"d_state": 4, "head_dim": 8}).add("attention", {"window": 5}).add("rwkv")
    attention = es.StackBuilder(d_model=16, n_heads=2, max_seq_len=256, mlp_ratio=1.0).add("attention")
    return {"itself": of, "hybrid": scaled(hybrid.build(dtype=torch.float64)), "attention": attention.build()}


def every_mixer() -> es.Stack:
    torch.manual_seed(0)
    model = scaled(es.build(es.load("every_mixer_mini", ["model.max_seq_len=256"]), dtype=torch.float64), 3.0)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


@pytest.mark.parametrize("ahead", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("draft", ["itself", "hybrid", "attention"])
def test_greedy_equals_the_model_alone_in_every_mixer(draft: str, ahead: int) -> None:
    model = every_mixer()
    wanted = written(model, PROMPTS, 24, temperature=0)
    assert len({token for row in wanted for token in row}) > 20
    assert written(model, PROMPTS, 24, temperature=0, draft=drafts(model)[draft], ahead=ahead) == wanted
    for row, prompt in enumerate(PROMPTS):
        assert (
            written(model, [prompt], 24, temperature=0, draft=drafts(model)[draft], ahead=ahead)
            == wanted[row : row + 1]
        )


def test_greedy_equals_recomputing(build_mini: Build) -> None:
    model = build_mini()
    wanted = [recomputed(model, prompt, 20) for prompt in PROMPTS]
    for ahead in (1, 4):
        assert written(model, PROMPTS, 20, temperature=0, draft=drafts(model)["hybrid"], ahead=ahead) == wanted
    rules: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.7}
    wanted = written(model, PROMPTS, 20, **rules)
    assert written(model, PROMPTS, 20, **rules, draft=drafts(model)["hybrid"], ahead=3) == wanted


def test_all_guesses_of_the_model_itself_are_kept(build_mini: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gained = build_mini(), []
    call = Speculation.__call__

    def counted(self: Speculation, last: list[int], guesses: list[int]) -> list[list[int]]:
        ids = call(self, last, guesses)
        gained.append([len(row) for row in ids])
        return ids

    monkeypatch.setattr(Speculation, "__call__", counted)
    greedy, drawn = {"temperature": 0, "repetition_penalty": 1e3}, {"temperature": 0.8, "top_k": 50, "seed": 0}
    for rules in ({"temperature": 0}, drawn, greedy, {**drawn, "repetition_penalty": 20.0}):
        gained.clear()
        written(model, PROMPTS, 14, draft=model, ahead=4, **rules)
        assert gained == [[5, 5, 5], [5, 5, 5], [3, 3, 3]]


def test_both_states_stand_before_the_last_token_after_each_round() -> None:
    model, draft, prompts = small(0), small(1), [[1, 3, 0], [2]]
    for stack in (model, draft):
        stack.double()
    sample = Sampler(2, 4, torch.device("cpu"))
    with torch.no_grad():
        tapes = [Tape(stack, prefill(stack, prompts, 28)[1], 4, keep=2) for stack in (model, draft)]
        speculation, rows = Speculation(*tapes, sample), [[*prompt, 1] for prompt in prompts]
        for guesses in ([3, 3], [2, 3], [3, -1], [0, 2], [3, 3]):
            gained = speculation([row[-1] for row in rows], guesses)
            rows = [row + new for row, new in zip(rows, gained, strict=True)]
            last = torch.tensor([row[-1:] for row in rows])
            for tape in tapes:
                assert tape.state.length.tolist() == [len(row) - 1 for row in rows]
                close(tape.recurrent(last), told(tape.model, [row[:-1] for row in rows], last), 1e-12)
                tape.rollback(1)


def small(seed: int, vocab: int = 4) -> es.Stack:
    """A hybrid of very uneven and very different distributions."""
    torch.manual_seed(seed)
    tokenizer = {"type": "hf", "pretrained": "none"}
    builder = es.StackBuilder(d_model=8, n_heads=2, vocab_size=vocab, max_seq_len=32, tokenizer_contract=tokenizer)
    model = builder.add("retnet").add("attention").add("mamba", {"d_state": 4, "head_dim": 4}).build()
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    return scaled(model, 3.0)


def ruled(logits: torch.Tensor, seen: list[int], rules: dict[str, Any]) -> torch.Tensor:
    """[V] probabilities after the rules, by their definitions."""
    logits = logits.clone()
    for token in set(seen):
        penalty = rules.get("repetition_penalty", 1.0)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    share = (logits / rules.get("temperature", 1.0)).softmax(-1)
    order = share.argsort(descending=True).tolist()
    left = order[: rules.get("top_k", len(order))]
    share = share / share[left].sum()
    before = [float(share[left[:i]].sum()) for i in range(len(left))]
    left = [t for t, reached in zip(left, before, strict=True) if reached < rules.get("top_p", 2.0)]
    left = [t for t in left if share[t] >= rules.get("min_p", 0.0) * share.max()]
    cut = torch.zeros_like(share)
    cut[left] = share[left] / share[left].sum()
    return cut


def exact(model: es.Stack, prompt: list[int], count: int, rules: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """The probability of each sequence of `count` tokens."""
    vocab, found = model.spec.model.vocab_size, {}
    for ids in product(range(vocab), repeat=count):
        logits = model.parallel(torch.tensor([[*prompt, *ids]])).double()[0].detach()
        chance = 1.0
        for i, token in enumerate(ids):
            chance *= float(ruled(logits[len(prompt) + i - 1], [*prompt, *ids[:i]], rules)[token])
        found[ids] = chance
    return found


def surprise(counts: dict[tuple[int, ...], int], chances: dict[tuple[int, ...], float]) -> float:
    """How many standard deviations chi-square lies above what it is expected to be; rare sequences count as one."""
    total = sum(counts.values())
    assert all(chances[ids] > 0 for ids in counts), "what the rules cut was written"
    rare = [ids for ids, chance in chances.items() if chance * total < 5]
    cells = [([ids], chance) for ids, chance in chances.items() if chance * total >= 5]
    cells += [(rare, sum(chances[ids] for ids in rare))]
    terms = [(sum(counts.get(i, 0) for i in ids) - total * c) ** 2 / (total * c) for ids, c in cells if c > 0]
    freedom = len(terms) - 1
    assert freedom > 4
    return (sum(terms) - freedom) / (2 * freedom) ** 0.5


RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature and top_k": {"temperature": 1.5, "top_k": 3},
    "temperature and top_p": {"temperature": 2.0, "top_p": 0.9},
    "min_p": {"min_p": 0.1, "temperature": 2.0},
    "repetition_penalty": {"repetition_penalty": 2.0},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ahead", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_written_has_the_models_distribution(name: str, ahead: int) -> None:
    model, draft, rules, prompt, rows = small(0), small(1), RULES[name], [1, 3, 0], 3000
    chances = exact(model, prompt, 3, rules)
    steps = list(es.generate(model, [prompt] * rows, 3 + ahead, seed=1, draft=draft, ahead=ahead, **rules))[:3]
    counts: dict[tuple[int, ...], int] = {}
    for ids in zip(*steps, strict=True):
        counts[ids] = counts.get(ids, 0) + 1  # type: ignore[index, arg-type]
    assert surprise(counts, chances) < 4
    other = exact(draft, prompt, 3, rules)
    if all(other[ids] > 0 for ids in counts):
        assert surprise(counts, other) > 20  # the test would see the draft's distribution


def test_stops_in_a_ragged_batch(build_mini: Build) -> None:
    model = build_mini()
    free = written(model, PROMPTS, 20, temperature=0)
    for stop in (free[0][4], free[1][9], free[2][0]):
        wanted = list(es.generate(model, PROMPTS, 20, temperature=0, stop=[stop]))
        for draft in drafts(model).values():
            assert list(es.generate(model, PROMPTS, 20, temperature=0, stop=[stop], draft=draft)) == wanted


def test_a_seed_gives_the_same_in_any_company(build_mini: Build) -> None:
    model = build_mini()
    rules: dict[str, Any] = {"seed": 5, "temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3}
    rules["draft"] = drafts(model)["hybrid"]
    together = written(model, PROMPTS, 20, **rules)
    assert together == written(model, PROMPTS, 20, **rules)
    for row, prompt in enumerate(PROMPTS):
        assert written(model, [prompt], 20, **{**rules, "seed": 5 + row})[0] == together[row]


def test_logprobs_are_the_models(build_mini: Build) -> None:
    model = build_mini()
    prompt, options = PROMPTS[0], {"seed": 0, "temperature": 0.3, "logprobs": 3}
    for draft in drafts(model).values():
        steps = [step[0] for step in es.generate(model, [prompt], 9, draft=draft, **options)]  # type: ignore[arg-type]
        scores = model(torch.tensor([prompt + steps]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        for token, wanted in zip(steps, scores, strict=True):
            assert isinstance(token, Token)
            close(torch.tensor([token.logprob]), wanted[token][None].float(), 1e-6)
            assert list(token.top) == wanted.topk(3).indices.tolist()


def test_the_last_token_fits_exactly(build_mini: Build) -> None:
    model, prompt = build_mini(), list(range(240))
    wanted = written(model, [prompt, [3]], 16, temperature=0)
    for draft in (model, drafts(model)["hybrid"]):
        assert written(model, [prompt, [3]], 16, temperature=0, draft=draft, ahead=9) == wanted


def test_drafts_that_cannot_guess_are_refused_before_the_first_token(build_mini: Build) -> None:
    model = build_mini()
    short = es.StackBuilder(d_model=16, n_heads=2, max_seq_len=8).add("attention").build()
    for options, message in (
        ({"draft": small(0)}, "knows 4 ids and the model 256"),
        ({"draft": model, "ahead": 0}, "ahead = 0"),
        ({"draft": es.build(model.spec, "meta")}, "the draft is on meta and the model on cpu"),
        ({"draft": short}, "the draft cannot follow: 13 tokens are more than model.max_seq_len = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            es.generate(model, [[1] * 10], 3, **options)  # type: ignore[arg-type]


def test_the_command_takes_a_draft(build_mini: Build, tmp_path: Path) -> None:
    model = build_mini(torch.float32)
    for name, stack in (("model", model), ("draft", drafts(model)["attention"])):
        es.save_checkpoint(stack, tmp_path / name)
    words = ["generate", "--checkpoint", str(tmp_path / "model"), "--prompt", "doc", "--temperature", "0"]
    words += ["--max-new-tokens", "12"]
    alone, guessed, lost = (
        CliRunner().invoke(cli, [*words, *more])
        for more in ([], ["--draft", str(tmp_path / "draft"), "--ahead", "2"], ["--ahead", "2"])
    )
    assert (alone.exit_code, guessed.exit_code) == (0, 0)
    assert guessed.output == alone.output
    assert lost.exit_code != 0
    assert "--ahead 2 is how far a draft guesses: give --draft DIR too" in lost.output
