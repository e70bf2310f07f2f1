"""The commands of docs/training.md, docs/data.md and of examples/slurm are ones that `fit` takes."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOLD = [ROOT / "docs" / "training.md", ROOT / "examples" / "slurm" / "train.sbatch", ROOT / "docs" / "data.md"]
OTHERS = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--kill-on-bad-exit", "--requeue"}
OTHERS |= {"--batch", "--tokens", "--help", "--logger.save_dir"}


def test_the_slurm_file_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(TOLD[1])], check=True)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_every_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from eulerstack.cli.train import run

    with pytest.raises(SystemExit):
        run("fit", ["--help"])
    known = set(re.findall(r"--[a-z][\w.]*", capsys.readouterr().out))
    for file in TOLD:
        text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#SBATCH"))
        given = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)) - OTHERS
        nested = {option for option in given if option.startswith("--trainer.logger.")}  # by the logger that is named
        assert given - nested <= known | {"--preset", "--checkpoint"}, (file.name, given - nested - known)
