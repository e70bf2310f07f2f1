"""What the documents show works as shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import eulerstack as es

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_stack_file_of_the_readme_builds() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert len(es.expand(es.loads(block))) == 4


def test_every_path_in_the_readmes_tree_is_there() -> None:
    (tree,) = re.findall(r"```\n(eulerstack/\n.*?)```", README, re.S)
    for line in tree.splitlines()[1:]:
        for name in re.findall(r"(?:^|\s{2,})([a-z_]+(?:/|\.py))", line):
            assert (ROOT / name).exists() or any((ROOT / "eulerstack").rglob(name.rstrip("/"))), name


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    commands = re.findall(r"^\.venv/bin/eulerstack (.*)$", README, re.M)
    assert len(commands) == 7
    for command in commands:
        words = command.replace("--trainer.max_steps 400", "--trainer.max_steps 2")
        words = words.replace('--prompt "def "', "--prompt def --max-new-tokens 5")
        if words.startswith("test"):
            words += " --trainer.limit_test_batches 2"
        environment = {**os.environ, "COLUMNS": "120"}
        done = subprocess.run(
            [sys.executable, "-m", "eulerstack", *words.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, (command, done.stderr)
        assert "Warning" not in done.stderr, (command, done.stderr)


@pytest.mark.parametrize(
    "verb", ["", "validate", "explain", "estimate", "presets", "schema", "generate", "fit", "test"]
)
def test_help_teaches(verb: str) -> None:
    done = subprocess.run([sys.executable, "-m", "eulerstack", *verb.split(), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sage:" in done.stdout
    assert verb in done.stdout
