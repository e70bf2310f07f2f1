"""checkpoint convert: a checkpoint directory from a run's .ckpt, or from another directory in another dtype."""

from pathlib import Path
from typing import Any

import torch

from ..checkpoint import META, load_checkpoint, save_checkpoint, stack_of_run, with_dtype
from ..paths import expand_home
from ..stored import check_checkpoint
from ..tokens import tokenizer_of


def convert(source: str, target: str, dtype: str | None) -> None:
    """Write TARGET whole, with the tokenizer. Raises ValueError for a source that holds no stack."""
    place, wanted = expand_home(source), None if dtype is None else getattr(torch, dtype)
    if not place.exists():
        raise ValueError(f"there is no {source}: give a run's resume/last.ckpt, or a checkpoint directory")
    ours = place.is_dir() and not (place / META).is_file()
    model = load_checkpoint(place, dtype=wanted) if ours else stack_of_run(place, wanted)
    if wanted is not None:
        model.spec = with_dtype(model.spec, wanted)
    folder = place if ours else place.resolve().parent.parent / "checkpoint"
    tokenizer = tokenizer_of(model.spec.tokenizer_contract, folder)
    save_checkpoint(model, target, tokenizer, _notes(place) if ours else None)
    print(f"checkpoint: {target}")


def _notes(folder: Path) -> dict[str, Any]:
    """What the header of a checkpoint holds beside what each has: what it was trained on, its step."""
    return {key: value for key, value in check_checkpoint(folder).items() if key not in ("format", "extensions")}
