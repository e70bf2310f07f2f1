"""checkpoint convert: a checkpoint directory from a run's .ckpt, or from another directory in another dtype."""

from pathlib import Path

import torch

from ..checkpoint import META, load_checkpoint, save_checkpoint, stack_of_run, with_dtype
from ..tokens import tokenizer_of


def convert(source: str, target: str, dtype: str | None) -> None:
    """Write TARGET whole, with the tokenizer. Raises ValueError for a source that holds no stack."""
    place, wanted = Path(source), None if dtype is None else getattr(torch, dtype)
    if not place.exists():
        raise ValueError(f"there is no {source}: give a run's resume/last.ckpt, or a checkpoint directory")
    ours = place.is_dir() and not (place / META).is_file()
    model = load_checkpoint(place, dtype=wanted) if ours else stack_of_run(place, wanted)
    if wanted is not None:
        model.spec = with_dtype(model.spec, wanted)
    folder = place if ours else place.resolve().parent.parent / "checkpoint"
    save_checkpoint(model, target, tokenizer_of(model.spec.tokenizer_contract, folder))
    print(f"checkpoint: {target}")
