"""The command line in this process."""

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from eulerstack.cli.main import cli


@pytest.fixture
def eulerstack(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs one verb in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(cli, words, prog_name="eulerstack")
