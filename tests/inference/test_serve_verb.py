"""`eulerstack serve` as a process: the official client, signals, and what is said of wrong options."""

import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from eulerstack.cli.main import cli
from eulerstack.cli.serve import of_bytes

from ..conftest import PATIENCE
from .conftest import MINI, process

pytest.importorskip("openai", reason="needs pip install 'eulerstack[dev]'")


def test_the_official_client_and_a_signal(checkpoint: Path) -> None:
    from openai import BadRequestError, OpenAI

    with process(checkpoint, "--max-tokens", "128", "--slots", "2", "--api-key", "k", "--prefix-bytes", "1MiB") as (
        url,
        one,
    ):
        client = OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=PATIENCE)
        (model,) = client.models.list()
        assert model.id == client.models.retrieve(MINI).id == MINI
        fields: dict[str, Any] = {"model": MINI, "prompt": "def ", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**fields, logprobs=1, echo=True)
        assert whole.usage is not None and whole.usage.total_tokens == 12
        assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.tokens or ()) == 12
        pieces = client.completions.create(**fields, stream=True)
        assert "def " + "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        talk: dict[str, Any] = {
            "model": MINI,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 8,
            "seed": 1,
        }
        said = client.chat.completions.create(**talk).choices[0].message
        parts = client.chat.completions.create(**talk, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == said.content
        assert said.role == "assistant"
        talk["messages"] += [said.model_dump(), {"role": "user", "content": "and?"}]
        assert client.chat.completions.create(**talk).choices[0].message.role == "assistant"
        with pytest.raises(BadRequestError, match="best_of = 3 is not supported"):
            client.completions.create(**fields, best_of=3)
        one.send_signal(signal.SIGTERM)
        assert one.wait(PATIENCE) == 0


def test_what_is_wrong_is_said_in_a_sentence(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*options: str) -> str:
        done = CliRunner().invoke(cli, ["serve", "--checkpoint", str(checkpoint), *options])
        assert done.exit_code == 2
        return done.output

    assert "--budget = 'lots' is no size: write bytes, or as in 512MiB or 2GiB" in said("--budget", "lots")
    assert "budget = 1024 bytes do not hold one slot" in said("--budget", "1KiB")
    assert "cannot listen on --host 256.1.1.1 --port 0" in said("--host", "256.1.1.1", "--port", "0")
    assert "is no checkpoint" in said("--checkpoint", "nowhere")
    monkeypatch.setattr("eulerstack.cli.serve.find_spec", lambda name: None)
    assert said() == "serve needs fastapi and uvicorn: pip install 'eulerstack[serve]'\n"


@pytest.mark.parametrize(("text", "size"), [("7", 7), ("1KiB", 1024), ("2.5 MiB", 2621440), ("3GB", 3 * 10**9)])
def test_sizes(text: str, size: int) -> None:
    assert of_bytes("--body", text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1e9", "2Gi", "GiB", "0.1", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        of_bytes("--body", text)
