"""What the documents show works as shown."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import eulerstack as es
from eulerstack.cli.main import cli

from .conftest import PATIENCE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def test_the_stack_file_of_the_readme_builds() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert len(es.expand(es.loads(block))) == 4


def test_every_path_in_the_readmes_tree_is_there() -> None:
    (tree,) = re.findall(r"```\n(eulerstack/\n.*?)```", README, re.S)
    for line in tree.splitlines()[1:]:
        for name in re.findall(r"(?:^|\s{2,})([a-z_]+(?:/|\.py))", line):
            assert (ROOT / name).exists() or any((ROOT / "eulerstack").rglob(name.rstrip("/"))), name


def commands(page: Path) -> list[list[str]]:
    """The eulerstack commands that a page shows, in order; those in `sh` need a reader's own GPUs or texts."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = re.findall(r"^(?:\.venv/bin/)?eulerstack (.*)$", "\n".join(blocks), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def write_files(page: Path, folder: Path) -> None:
    """The files that a page shows: YAML whose first line is a comment with the name."""
    for name, text in re.findall(r"^```yaml\n# (\S+\.yml)\n(.*?)^```", page.read_text(), re.M | re.S):
        (folder / name).write_text(text)


def shortened(words: list[str]) -> list[str]:
    """The same command, done in seconds."""
    brief = {
        "fit": ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "2"],
        "test": ["--trainer.limit_test_batches", "2"],
    }
    return [*words, *brief.get(words[0], []), *(["--max-new-tokens", "5"] if words[0] == "generate" else [])]


def test_the_pages_show_commands() -> None:
    assert len(commands(ROOT / "README.md")) >= 7
    assert len(commands(ROOT / "docs" / "tutorial.md")) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_light_commands_of_the_documents_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        if words[0] not in ("fit", "test", "generate", "serve"):
            done = CliRunner().invoke(cli, words)
            assert done.exit_code == 0, (words, done.output)


def serve(page: Path, words: list[str], folder: Path) -> None:
    """Run the server that a page shows, on a free port, and what the page asks it by curl; then end it."""
    lines = re.findall(r"^curl .*$", page.read_text(), re.M)
    command = [sys.executable, "-m", "eulerstack", *words, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        for line in lines:
            asked = shlex.split(line.replace("http://127.0.0.1:8000", found[0]))
            done = subprocess.run([*asked, "--fail"], capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout, (line, done.stderr)
        server.terminate()
        assert server.wait(PATIENCE) == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_documents_runs(page: Path, tmp_path: Path) -> None:
    write_files(page, tmp_path)
    for words in commands(page):
        if words[0] == "serve":
            serve(page, words, tmp_path)
            continue
        done = subprocess.run(
            [sys.executable, "-m", "eulerstack", *shortened(words)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        assert done.returncode == 0, (words, done.stderr)
        assert "Warning" not in done.stderr, (words, done.stderr)


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#\w+)?\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)


@pytest.mark.parametrize(
    "verb", ["", "validate", "explain", "estimate", "presets", "schema", "generate", "serve", "fit", "test"]
)
def test_help_teaches(verb: str) -> None:
    done = subprocess.run([sys.executable, "-m", "eulerstack", *verb.split(), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sage:" in done.stdout
    assert verb in done.stdout
