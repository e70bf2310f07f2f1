"""`python -m benchmarks.inference`: decoding, the engine, prefill, long contexts and memory, each beside its peer.

Writes results/cpu_inference.md. Everything is a ratio of two things that are timed in turns within seconds of each
other, each by its quickest round, so that a busy machine changes it little; medians are told beside. Where others work
on the machine, `chrt -r 1` keeps them from the cores while it runs: a thread that waits for one loses 8 milliseconds.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eulerstack as es
from eulerstack.inference.engine import Engine
from eulerstack.inference.generate import prefill
from eulerstack.inference.sessions import Sessions
from eulerstack.inference.speculation import Speculation
from eulerstack.inference.steps import WARM, Steps
from eulerstack.kernels.recording import Recording
from eulerstack.layers.linear import is_bare

from .peers import MODELS, OURS, VOCAB
from .timing import interleaved

RESULTS = Path(__file__).parent / "results" / "cpu_inference.md"
LARGE, LARGER, HYBRID = "llm_0p1b_simple", "llm_0p8b_simple", "llm_0p1b_jamba"
RECURRENT = ("retnet", "mamba1", "mamba2", "rwkv", "linear")
NEW, PROMPT, SLOTS, CONTEXT = 32, 32, 16, 100

Step = Callable[[], object]
Section = Callable[[int], list[str]]


def small(name: str) -> es.Stack:
    stack = OURS[name]().module
    assert isinstance(stack, es.Stack)
    return stack.eval()


def large(name: str = LARGE) -> es.Stack:
    return es.build(es.load(name), dtype=torch.float32).eval()


def against_transformers(rounds: int) -> list[str]:
    """`generate`, greedy, batch 1: a Llama of equal widths and parameters by its default cache, and by a static one."""
    return [line for tokens in (NEW, 4 * NEW) for line in [*_against_transformers(tokens, rounds), ""]]


def _against_transformers(tokens: int, rounds: int) -> list[str]:
    llama, prompt = MODELS["llama"]().module.eval(), torch.randint(0, VOCAB, (1, PROMPT))

    def theirs(**options: object) -> Step:
        asked = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return lambda: llama.generate(prompt, **asked, **options)  # type: ignore[operator]

    def ours(stack: es.Stack) -> Step:
        return lambda: list(es.generate(stack, prompt, tokens, temperature=0))

    mine = {f"eulerstack {name}": small(name) for name in ("attention", "retnet", "mamba2", "tri")}
    steps = {name: ours(stack) for name, stack in mine.items()}
    steps |= {"HF Llama": theirs(), "HF Llama, static": theirs(cache_implementation="static", disable_compile=True)}
    times = interleaved(steps, rounds)
    count = {**mine} | dict.fromkeys(("HF Llama", "HF Llama, static"), llama)
    lines = [f"A prompt of {PROMPT} tokens and {tokens} more.", ""]
    lines += ["| model | parameters | ms a token | median | times as fast as HF Llama | as its static cache |"]
    lines.append("|---|---|---|---|---|---|")
    for name, taken in times.items():
        parameters = sum(p.numel() for p in count[name].parameters())
        shown = [min(taken), statistics.median(taken)]
        against = [min(times[peer]) / min(taken) for peer in ("HF Llama", "HF Llama, static")]
        cells = [f"{1e3 * s / tokens:.2f}" for s in shown] + [f"{r:.2f}" for r in against]
        lines.append(f"| {name} | {parameters:,} | {' | '.join(cells)} |")
    return lines


def weights_of(stack: es.Stack) -> list[Tensor]:
    """Every matrix that a step of decoding reads."""
    layers = [m.weight for m in stack.layers.modules() if isinstance(m, nn.Linear) and is_bare(m)]
    return [*layers, stack.embedding.weight if stack.head is None else stack.head.weight]


def each(weights: list[Tensor], rows: int, product: Callable[[Tensor, Tensor], object]) -> Step:
    """A product with every weight, one after the other."""
    inputs = {n: torch.randn(rows, 1, n) for n in {weight.shape[1] for weight in weights}}

    def step() -> None:
        with torch.inference_mode():
            for weight in weights:
                product(inputs[weight.shape[1]], weight)

    return step


def recorded(step: Step) -> Step:
    """The same without Python between one product and the next, as a step of decoding is run."""
    with torch.inference_mode(), Recording() as heard:
        step()
    return torch.inference_mode()(heard.program())


def decoding(stack: es.Stack, rows: int, context: int = CONTEXT, room: int = 4096) -> Step:
    """One token more for each row, after `context` tokens."""
    with torch.inference_mode():
        state = stack.init_state(rows, context + room if stack.grows else None)
        for part in torch.randint(0, VOCAB, (rows, context)).split(512, 1):
            _, state = stack.chunkwise(part, state)
    held, token, one_more = [state], torch.zeros(rows, 1, dtype=torch.int64), Steps(stack)

    def step() -> None:
        with torch.inference_mode():
            _, held[0] = one_more(token, held[0])

    for _ in range(WARM + 1):  # recorded
        step()
    return step


def bandwidth(rounds: int) -> list[str]:
    """A step of decoding beside the sum of the very weights, which reads them and does nothing else."""
    return [line for name in (LARGE, LARGER) for line in [*_bandwidth(name, rounds), ""]]


def _bandwidth(name: str, rounds: int) -> list[str]:
    stack = large(name)
    weights = weights_of(stack)
    steps = {
        "sum of the weights": each(weights, 1, lambda x, weight: weight.sum()),
        "a step of decoding": decoding(stack, 1),
        "its linear layers alone": each(weights, 1, _by(stack)),
        "the same by F.linear": each(weights, 1, F.linear),
    }
    times = interleaved(steps, rounds)
    size = sum(w.numel() * w.element_size() for w in weights)
    lines = [f"{name}, float32, batch 1: {size:,} bytes of weights.", ""]
    lines += ["| what | ms | GB/s | of the sum's rate | median |", "|---|---|---|---|---|"]
    for what, taken in times.items():
        rate, share = size / min(taken) / 1e9, min(times["sum of the weights"]) / min(taken)
        typical = statistics.median(a / b for a, b in zip(times["sum of the weights"], taken, strict=True))
        lines.append(f"| {what} | {1e3 * min(taken):.2f} | {rate:.1f} | {share:.2f} | {typical:.2f} |")
    return lines


def _by(stack: es.Stack) -> Callable[[Tensor, Tensor], object]:
    return lambda x, weight: stack.linear(x, (weight,), (None,))


def engine(rounds: int) -> list[str]:
    """Tokens a second of 16 requests in 16 slots over those of one in one, and the same of the linear layers alone.

    The engine's own products are run as its steps are, from a recording; F.linear's are asked for from Python.
    """
    lines = ["| stack | engine, 16 : 1 | its linear layers, 16 : 1 | the first over the second | F.linear, 16 : 1 |"]
    lines.append("|---|---|---|---|---|")
    for name, stack in ((f"{LARGE}, float32", large()), ("tri", small("tri")), ("attention", small("attention"))):
        weights = weights_of(stack)
        steps = {f"engine {slots}": _served(stack, slots) for slots in (1, SLOTS)}
        steps |= {f"linear {rows}": recorded(each(weights, rows, _by(stack))) for rows in (1, SLOTS)}
        steps |= {f"F.linear {rows}": each(weights, rows, F.linear) for rows in (1, SLOTS)}
        quickest = {key: min(taken) for key, taken in interleaved(steps, rounds).items()}
        gains = [
            SLOTS * quickest[f"{kind} 1"] / quickest[f"{kind} {SLOTS}"] for kind in ("engine", "linear", "F.linear")
        ]
        lines.append(f"| {name} | {gains[0]:.2f} | {gains[1]:.2f} | {gains[0] / gains[1]:.2f} | {gains[2]:.2f} |")
    return lines


def _served(stack: es.Stack, slots: int) -> Step:
    """A step of an engine whose slots are all past their prompts."""
    serving = Engine(stack, slots, max_tokens=4096)

    def fill() -> None:
        for _ in range(slots):
            serving.submit([1] * CONTEXT, 2000, temperature=0)
        while serving.reading or serving.waiting:
            serving.step()

    def step() -> None:
        if serving.idle:
            fill()
        serving.step()

    fill()
    return step


def speculation(rounds: int) -> list[str]:
    """Greedy, batch 1: a draft of random weights, whose guesses are refused, and the model itself, whose are kept."""
    stack = es.build(es.load(HYBRID), dtype=torch.float32).eval()
    vocab = {"vocab_size": stack.spec.model.vocab_size, "tokenizer_contract": {"type": "hf", "pretrained": "none"}}
    layers = es.StackBuilder(64, 4, **vocab).add("mamba", repeat=3).add("attention")
    drafts = {"another": layers.build().eval(), "itself": stack}
    steps: dict[str, Step] = {"none": lambda: list(es.generate(stack, [1] * PROMPT, NEW, temperature=0))}
    kept: dict[str, tuple[int, int]] = {}
    for (name, draft), ahead in product(drafts.items(), (2, 4, 8)):
        options: dict[str, Any] = {"temperature": 0, "draft": draft, "ahead": ahead}
        key = f"{name}, {sum(p.numel() for p in draft.parameters()):,} | {ahead}"
        steps[key] = lambda options=options: list(es.generate(stack, [1] * PROMPT, NEW, **options))
        kept[key] = _kept(steps[key])
    times = interleaved(steps, max(3, rounds // 10))
    alone = min(times["none"])
    lines = [f"{HYBRID}, float32; alone {1e3 * alone / NEW:.1f} ms a token, the prompt's time included.", ""]
    lines += ["| draft, parameters | ahead | guesses kept | ms a token | ms a round | times as fast as alone |"]
    lines.append("|---|---|---|---|---|---|")
    for key, (guessed, turns) in kept.items():
        taken = 1e3 * min(times[key])
        share = (NEW - 1 - turns) / guessed
        lines.append(f"| {key} | {share:.0%} | {taken / NEW:.1f} | {taken / turns:.1f} | {1e3 * alone / taken:.2f} |")
    return lines


def _kept(step: Step) -> tuple[int, int]:
    """How many guesses a step makes, and in how many rounds: a round adds a token and the guesses that it keeps."""
    with mock.patch.object(Speculation, "__call__", autospec=True, side_effect=Speculation.__call__) as rounds:
        step()
    return sum(call.args[2][0] for call in rounds.call_args_list), rounds.call_count


def prompts(rounds: int, tokens: int = 4096) -> list[str]:
    """Tokens a second of reading a prompt in chunks, over those of a training step's forward pass."""
    lines = ["| stack | tokens/s of prefill | of the training forward | ratio |", "|---|---|---|---|"]
    for name in ("attention", "retnet", "mamba2", "tri"):
        stack, ids = small(name), torch.randint(0, VOCAB, (1, tokens))

        def read(stack: es.Stack = stack, ids: Tensor = ids) -> None:
            with torch.inference_mode():
                prefill(stack, ids.tolist())

        steps = {"prefill": read, "forward": lambda stack=stack, ids=ids: stack.losses(ids, ids)}
        quickest = {key: min(taken) for key, taken in interleaved(steps, max(8, rounds // 4)).items()}
        rates = [tokens / quickest[key] for key in ("prefill", "forward")]
        lines.append(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[0] / rates[1]:.2f} |")
    return lines


def long_contexts(rounds: int, long: int = 100_000) -> list[str]:
    """Stacks whose state does not grow: a token after 100,000 tokens beside one after 100."""
    lines = [f"| stack | ms at {CONTEXT} | ms at {long:,} | ratio |", "|---|---|---|---|"]
    for name in RECURRENT:
        stack = small(name)
        steps = {str(context): decoding(stack, 1, context) for context in (CONTEXT, long)}
        times = interleaved(steps, 4 * rounds, warmup=10)
        short, far = (1e3 * min(times[str(context)]) for context in (CONTEXT, long))
        lines.append(f"| {name} | {short:.3f} | {far:.3f} | {far / short:.3f} |")
    return lines


def shared_prefixes(rounds: int, shared: int = 2000) -> list[str]:
    """Time to the first token of prompts that share 2,000 tokens and differ in 20, with and without the store.

    Reading goes on from the last multiple of `prefill` that prompts share, so that smaller chunks reuse more.
    """
    lines = ["| stack | prefill | ms without the store | ms with it | times as fast | bytes kept |"]
    lines.append("|---|---|---|---|---|---|")
    for name in ("attention", "retnet", "tri"):
        stack = small(name)
        for chunk in (64, 128, 512):
            stored = Engine(stack, 4, 2048, prefill=chunk, prefix_bytes=1 << 30)
            steps = {
                "read": _first_token(Engine(stack, 4, 2048, prefill=chunk), shared),
                "reused": _first_token(stored, shared),
            }
            quickest = {key: 1e3 * min(taken) for key, taken in interleaved(steps, max(5, rounds // 4)).items()}
            assert stored.prefixes is not None
            cells = [f"{quickest['read']:.0f}", f"{quickest['reused']:.1f}"]
            cells.append(f"{quickest['read'] / quickest['reused']:.1f}")
            lines.append(f"| {name} | {chunk} | {' | '.join(cells)} | {stored.prefixes.bytes:,} |")
    return lines


def _first_token(serving: Engine, shared: int) -> Step:
    common = torch.randint(0, VOCAB, (shared,)).tolist()

    def step() -> None:
        request = serving.submit([*common, *torch.randint(0, VOCAB, (20,)).tolist()], 2, temperature=0)
        while not request.tokens:
            serving.step()
        serving.cancel(request)

    return step


def parked_sessions(rounds: int) -> list[str]:
    """A conversation resumed from its file, beside reading that file."""
    lines = ["| stack | tokens | bytes of the file | ms to resume | ms to read the file | ms to park |"]
    lines.append("|---|---|---|---|---|---|")
    for name, tokens in (("retnet", 100_000), ("mamba2", 100_000), ("tri", 32_000)):
        stack = small(name)
        with TemporaryDirectory() as folder:
            sessions, state = Sessions(folder, stack), stack.init_state(1)
            state.length.fill_(tokens)
            said = torch.randint(0, VOCAB, (tokens + 1,)).tolist()
            sessions.park("talk", state, said)
            file = Path(folder) / "talk.safetensors"
            steps: dict[str, Step] = {
                "resume": lambda sessions=sessions: sessions.resume("talk"),
                "read": file.read_bytes,
                "park": lambda sessions=sessions, state=state, said=said: sessions.park("talk", state, said),
            }
            quickest = {key: 1e3 * min(taken) for key, taken in interleaved(steps, max(5, rounds // 4)).items()}
            cells = " | ".join(f"{quickest[key]:.2f}" for key in ("resume", "read", "park"))
            lines.append(f"| {name} | {tokens:,} | {file.stat().st_size:,} | {cells} |")
    return lines


def memory(rounds: int) -> list[str]:
    """Bytes that a state takes, and that `estimate` says; nothing is timed."""
    lines = ["| stack | batch | tokens | bytes of state | of the estimate |", "|---|---|---|---|---|"]
    for name, batch, tokens in _sizes():
        spec = es.load(name)
        held, told = es.build(spec).init_state(batch, tokens).nbytes(), es.estimate(spec).state_bytes(batch, tokens)
        lines.append(f"| {name} | {batch} | {tokens:,} | {held:,} | {told['total']:,} |")
    return lines


def _sizes() -> Iterator[tuple[str, int, int]]:
    for name in ("arch_expert_research_mini", "every_mixer_mini", LARGE):
        for batch, tokens in ((1, 100), (16, 2000)):
            yield name, batch, tokens


SECTIONS: dict[str, Section] = {
    "A token of a 3M stack against transformers": against_transformers,
    "Reading the weights of stacks of 100M and 800M": bandwidth,
    "The engine: 16 requests over one": engine,
    "Speculative decoding": speculation,
    "Prefill of 4,096 tokens over the training forward": prompts,
    "A token after 100,000 tokens over one after 100": long_contexts,
    "A shared prefix of 2,000 tokens": shared_prefixes,
    "A session that rests on disk": parked_sessions,
    "The state's memory": memory,
}
"""What is measured, in the order of the report."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="counted rounds of each comparison")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; nothing is written then")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    about = f"On a CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    alone = ", at real-time priority on a shared machine" if os.sched_getscheduler(0) == os.SCHED_RR else ""
    report = ["# Inference", "", f"{about}{alone}; quickest of {options.rounds} interleaved rounds.", ""]
    for title in options.only or SECTIONS:
        section = [f"## {title}", "", *SECTIONS[title](options.rounds), ""]
        print("\n".join(section), flush=True)
        report += section
    if not options.only:
        RESULTS.write_text("\n".join(report))
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
