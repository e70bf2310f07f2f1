"""What reads the output of a verb: nobody any more, a full disk, nothing at all, a terminal that knows ASCII."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eulerstack as es

NAME = "réseau"
KINDS = {"read by nobody": 0, "full": 2, "closed": 0, "ascii": 0}
"""What an output is, and the code with which every verb ends then."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack file, its checkpoint and a text, all with names beyond ASCII."""
    folder = tmp_path_factory.mktemp("outputs")
    builder = es.StackBuilder(d_model=16, n_heads=2, max_seq_len=64).set(model={"family_hint": NAME}).add("attention")
    es.dump(builder.spec(), folder / f"{NAME}.yml")
    es.save_checkpoint(builder.build(), folder / NAME)
    (folder / "texts").mkdir()
    for number in range(4):
        (folder / "texts" / f"{number}.txt").write_text(f"the text number {number} of four\n" * 20)
    return folder


def verbs() -> list[list[str]]:
    file, data = f"{NAME}.yml", ["--data.path", "texts", "--data.cache_dir", "cache", "--data.seq_len", "16"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return [
        ["doctor"],
        ["presets", "list"],
        ["presets", "show", "arch_expert_research_mini"],
        ["schema"],
        ["validate", file, "--report"],
        ["validate", file, "--json"],
        ["explain", file],
        ["explain", file, "--picture", f"{NAME}.svg"],
        ["compile", file],
        ["compile", file, "--output", f"{NAME}.json"],
        ["estimate", file],
        ["diff", file, "arch_expert_research_mini"],
        ["checkpoint", "inspect", NAME],
        ["checkpoint", "convert", NAME, f"{NAME}16", "--dtype", "bfloat16"],
        ["generate", "--checkpoint", NAME, "--prompt", "é", "--max-new-tokens", "4"],
        ["generate", "--checkpoint", NAME, "--prompt", "é", "--max-new-tokens", "4", "--logprobs", "2"],
        ["fit", "--preset", file, *data, *quiet, "--trainer.max_steps", "1", "--trainer.default_root_dir", f"{NAME}/run"],
        ["test", "--checkpoint", NAME, *data, *quiet],
        ["--help"],
        ["fit", "--help"],
    ]  # fmt: skip


def is_run(kind: str, words: list[str]) -> bool:
    """Every verb is run for nobody; with the other outputs, one of each way to print."""
    some = ("presets", "explain", "compile", "checkpoint", "generate", "fit")
    return kind == "read by nobody" or (words[0] in some and "--logprobs" not in words)


@pytest.fixture(scope="module")
def ends(place: Path) -> dict[str, int]:
    """How every verb ended with every output."""
    numbered = [(kind, number, words) for kind in KINDS for number, words in enumerate(verbs())]
    runs = {f"{kind}, {number}": (kind, words) for kind, number, words in numbered if is_run(kind, words)}
    code = Path(__file__).with_name("outputs.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, code, json.dumps(runs)], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_ends_a_verb(kind: str, ends: dict[str, int], place: Path) -> None:
    for number, words in enumerate(verbs()):
        if not is_run(kind, words):
            continue
        said = place / f"{kind}, {number}"
        error = said.with_suffix(".err").read_text()
        assert ends[said.name] == KINDS[kind], (words, error)
        assert "Traceback" not in error and "Exception ignored" not in error
        lost = "the output cannot be written: No space left on device; what was printed is lost\n"
        assert error.endswith(lost) if kind == "full" else lost not in error
    for left in (f"{NAME}.svg", f"{NAME}.json", f"{NAME}16/spec.yml", f"{NAME}/run/checkpoint/spec.yml"):
        assert (place / left).is_file(), "what a verb is for is done, whoever reads what it says"


def test_a_name_is_written_with_replacements(ends: dict[str, int], place: Path) -> None:
    wanted = {"explain": "r?seau", "compile": "wrote r?seau.json", "checkpoint": "checkpoint: r?seau16"}
    wanted |= {"fit": "checkpoint: r?seau/run/checkpoint", "generate": "?"}
    found: dict[str, str] = {}
    for number, words in enumerate(verbs()):
        file = place / f"ascii, {number}.out"
        if file.is_file():
            found[words[0]] = found.get(words[0], "") + file.read_bytes().decode("ascii")
    for verb, part in wanted.items():
        assert part in found[verb]


@pytest.mark.parametrize("words", [["presets", "list"], ["nonsense"], ["validate", "nowhere.yml"]])
def test_a_shell_that_closes_all_streams(words: list[str], tmp_path: Path) -> None:
    """Standard error does not become standard output, nor either of them the next file that is opened."""
    line = f"{sys.executable} -m eulerstack {' '.join(words)} <&- 2>&-"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    good = words[0] == "presets"
    assert done.returncode == (0 if good else 2)
    assert ("arch_expert_research_mini" in done.stdout) if good else (done.stdout == "")
    assert subprocess.run(f"{line} >&-", shell=True, cwd=tmp_path).returncode == done.returncode


def test_what_is_generated_for_nobody_is_not_generated(place: Path) -> None:
    words = ["generate", "--checkpoint", NAME, "--prompt", "a", "--max-new-tokens", "60"]
    code = "import sys, os, eulerstack.inference.generate as g\nfrom eulerstack.cli import main, write\ncount = 0\n"
    code += "def counted(*words, **more):\n    global count\n    for step in g.generate(*words, **more):\n"
    code += "        count += 1\n        yield step\n"
    code += (
        f"write.generate = counted\nsys.argv = ['eulerstack', *{words!r}]\nmine, theirs = os.pipe()\nos.close(mine)\n"
    )
    code += "os.dup2(theirs, 1)\ntry:\n    main.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
    code += "assert 1 <= count <= 2, count\n"
    subprocess.run([sys.executable, "-c", code], cwd=place, check=True)
