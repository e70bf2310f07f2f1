"""serve: a checkpoint behind OpenAI's routes."""

import re
from importlib.util import find_spec

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def serve(
    checkpoint: str,
    host: str,
    port: int,
    api_key: str | None,
    slots: int,
    max_tokens: int | None,
    budget: str | None,
    prefix_bytes: str | None,
    sessions: str | None,
    queue: int,
    body: str,
    drain: float,
    device: str,
) -> None:
    """Load the stack, then serve it until a signal."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs {' and '.join(missing)}: pip install 'eulerstack[serve]'")
    room = None if budget is None else of_bytes("--budget", budget)
    kept = None if prefix_bytes is None else of_bytes("--prefix-bytes", prefix_bytes)
    most = of_bytes("--body", body)

    from ..checkpoint import load_checkpoint
    from ..inference import server
    from ..inference.engine import Engine
    from ..inference.routes import Api
    from ..inference.service import Service
    from ..inference.sessions import Sessions
    from ..spec import load
    from ..tokens import tokenizer_for
    from .write import usable

    model = load_checkpoint(checkpoint, usable(device))
    tokenizer = tokenizer_for(load(checkpoint), checkpoint)
    model.check_keeps_state()
    parked = None if sessions is None else Sessions(sessions, model)
    service = Service(Engine(model, slots, max_tokens, room, prefix_bytes=kept, sessions=parked), queue)
    server.serve(Api(service, tokenizer, model.spec.model.name, api_key, most), host, port, drain)


def of_bytes(option: str, text: str) -> int:
    """A size as 2GiB or 500MB, in bytes. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]*)", text)
    if found is None or found[2] not in UNITS or (size := int(float(found[1]) * UNITS[found[2]])) < 1:
        raise ValueError(f"{option} = {text!r} is no size: write bytes, or as in 512MiB or 2GiB")
    return size
