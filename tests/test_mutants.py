"""The suites can fail: each of these small faults, of kinds that have hit released code, is caught by one of them."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MUTANTS = {
    "the state is not decayed over a ragged chunk": (
        "kernels/retention/torch.py", "last[..., 0].exp()", "(last[..., 0] * 0.99).exp()"),
    "chunks feed the state without decay (the paper's Fig. 4)": (
        "kernels/retention/torch.py", "(last - total).exp()", "torch.ones_like(total)"),
    "a chunk reads its state one token late": (
        "kernels/retention/torch.py", "entering, leaving, across = total.exp()", "entering, leaving, across = (total - total[..., :1]).exp()"),
    "decays summed in float32": (
        "kernels/retention/torch.py", "decay = log_decay.double()", "decay = log_decay.float()"),
    "packed documents leak inside a chunk": (
        "kernels/retention/torch.py", "same: Tensor = (label[..., :, None] == label[..., None, :])[:, :, None]", "same = (label >= 0)[:, :, None, None]"),
    "a document inherits the state of the one before": (
        "kernels/retention/torch.py", "entering = entering * (label == start)[:, :, None]", "entering = entering * (label >= 0)[:, :, None]"),
    "padding decays a state": (
        "kernels/retention/torch.py", "return segments.mask(decay)", "return decay.expand(segments.position.shape[0], -1, -1)"),
    "a step ignores the document's start": (
        "kernels/retention/torch.py", "decay if segments.plain else decay * (segments.running == 0)", "decay"),
    "the convolution sees the document before": (
        "kernels/conv/windows.py", "seen = (label[:, tap : tap + tokens] == own)[..., None]", "seen = (label[:, tap : tap + tokens] >= 0)[..., None]"),
    "the convolution's state has padding in it": (
        "kernels/conv/windows.py", "slots = (segments.first + segments.count)[:, None]", "slots = (0 * segments.first + segments.label.shape[1])[:, None]"),
    "positions go on over a document's start": (
        "segments.py", "position = index - offset + ", "position = index - segments_first(self) + ".replace("segments_first(self)", "self.first[:, None]")),
    "a window too wide by one": (
        "segments.py", "tril(-window)", "tril(-window - 1)"),
    "the ring forgets what a query may still see": (
        "mixers/cached.py", "(distance < self.window)", "(distance < self.window - 1)"),
    "a step does not see its own key": (
        "mixers/cached.py", 'segments.ends(segments.before(x.shape[0])), "after")', 'segments.before(x.shape[0]), "after")'),
    "queries of a new document see the cache": (
        "mixers/cached.py", "before = before & (segments.label == 0)[..., None]", "before = before & (segments.label >= 0)[..., None]"),
    "gradients of a convolution lose the state": (
        "kernels/conv/torch.py", "_before(for_state, lag, x.shape[1]).addcmul_(reach, tap)", "_before(for_state, lag, x.shape[1])"),
    "gradients of the decay are one-sided": (
        "kernels/retention/torch.py", "grad.sum(-1, dtype=torch.float64) - grad.sum(-2, dtype=torch.float64)", "grad.sum(-1, dtype=torch.float64)"),
    "a compiled chunk reads its state undecayed": (
        "kernels/retention/numba.py", "own[e] + more[e] * by[c]", "own[e] + more[e]"),
    "compiled gradients lose what a state carries on": (
        "kernels/retention/numba.py", "grad[e] = grad[e] * by + more[e]", "grad[e] = grad[e] * by"),
    "a compiled convolution's gradient takes one tap": (
        "kernels/conv/numba.py", "back[d] += total[d] * by[d]", "back[d] = total[d] * by[d]"),
    "a scan's gradient passes into the document before": (
        "kernels/selective_scan/numba.py", "_clear(grad)", "_copy(grad, grad)"),
    "a scan's dt has the gradient of one number of state": (
        "kernels/selective_scan/numba.py", "for_dt[d] += for_log * rate[d]", "for_dt[d] = for_log * rate[d]"),
    "a long span starts from the state of the one before": (
        "mixers/base.py", "y, state = chunk(part, state", "y, _ = chunk(part, state"),
    "a ragged chunk starts from the state of the one before": (
        "kernels/retention/torch.py", "y, state = span(q[:, part]", "y, _ = span(q[:, part]"),
    "the token has no bonus": (
        "kernels/wkv/torch.py", "own = u + k", "own = 0 * u + k"),
    "padding decays a weighted mean": (
        "kernels/wkv/torch.py", "held = (_known(state) - segments.count[:, None] * w)", "held = (_known(state) - tokens * w)"),
    "a long convolution wraps around": (
        "kernels/long_conv/torch.py", "size = max(2 * tokens, 2)", "size = max(tokens, 2)"),
    "a latent's rotated key is not turned": (
        "mixers/latent.py", "rotate(key[:, :, None], *turn)[:, :, 0]", "key"),
}  # fmt: skip


ENGINES = {
    "a slot begins with the last request's state": (
        "inference/engine.py", "self.state = self.state.put([slot], self.fresh)", "pass"),
    "a step feeds rows whose prompts are still read": (
        "inference/engine.py", "real[rows] = True", "real[sorted(self.active)] = True"),
    "the bound of caches is the shortest row's": (
        "inference/engine.py", "bound = max(request.length", "bound = min(request.length"),
    "who came last is served first": (
        "inference/engine.py", "request = self.waiting.popleft()", "request = self.waiting.pop()"),
    "later chunks overwrite a short prompt's last logits": (
        "inference/generate.py", "last = torch.where((left > 0)[:, None], ends[:, 0], last)", "last = ends[:, 0]"),
    "positions count padding on the left": (
        "segments.py", "offset = torch.where(begins, index, 0)", "offset = torch.where(begins & (label > 0), index, 0)"),
    "a recorded step is given the tokens it was recorded with": (
        "inference/steps.py", "found.tokens.copy_(tokens)", "pass"),
    "a recorded step feeds the rows it was recorded with": (
        "inference/steps.py", "found.real.copy_(real)", "pass"),
    "a recorded step reads no further than it was recorded for": (
        "inference/steps.py", "same and self.room == _room(state)", "same"),
    "a window's ring is one slot short": (
        "mixers/cached.py", "ring = None if self.window is None else self.window + rollback", "ring = None if self.window is None else max(1, self.window + rollback - 1)"),
    "a loaded state forgets how far it reaches": (
        "state.py", "return replace(state, bound=self.longest)", "return state"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS | ENGINES)
def test_what_a_mutant_changes_stands_once_in_its_file(name: str) -> None:
    """Quick: who changes such a line learns of it here, and not from `make test-full`."""
    mutated(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    caught(name, tmp_path, "tests/contract", "tests/kernels")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_mutant_is_caught_by_what_is_generated(name: str, tmp_path: Path) -> None:
    caught(name, tmp_path, "tests/inference/test_equal.py", "tests/inference/test_failures.py")


def mutated(name: str) -> tuple[str, str]:
    """A mutant's file, below eulerstack/, and its text with the fault."""
    file, sound, faulty = (MUTANTS | ENGINES)[name]
    text = (ROOT / "eulerstack" / file).read_text(encoding="utf-8")
    assert text.count(sound) == 1, f"{sound!r} stands {text.count(sound)} times in eulerstack/{file}: change MUTANTS"
    changed = text.replace(sound, faulty)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), "nothing changes"
    return file, changed


def caught(name: str, tmp_path: Path, *tests: str) -> None:
    file, changed = mutated(name)
    for part in ("eulerstack", "tests", "presets"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "eulerstack" / file).write_text(changed, encoding="utf-8")
    words = ["-m", "pytest", *tests, "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout
