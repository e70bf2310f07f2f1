"""eulerstack: mix sequence mixers in one YAML file; train, and generate from one state cache.

The names below are the public API. They are imported when first used: `import eulerstack` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .builder import StackBuilder
    from .checkpoint import load_checkpoint, save_checkpoint
    from .costs import Estimate, estimate
    from .inference.engine import Engine
    from .inference.generate import generate
    from .inference.sessions import Sessions
    from .inference.tape import Tape
    from .model import Stack, build
    from .segments import Segments
    from .spec import ExtensionSpec, SpecError, StackSpec, dump, expand, load, loads, presets, register
    from .state import StackState
    from .tokens import tokenizer_of
    from .training.data import TextData
    from .training.module import StackModule

__version__ = "0.1.0"

_HOMES = {
    "Engine": "inference.engine",
    "Estimate": "costs",
    "ExtensionSpec": "spec",
    "Segments": "segments",
    "Sessions": "inference.sessions",
    "SpecError": "spec",
    "Stack": "model",
    "StackBuilder": "builder",
    "StackModule": "training.module",
    "StackSpec": "spec",
    "StackState": "state",
    "Tape": "inference.tape",
    "TextData": "training.data",
    "build": "model",
    "dump": "spec",
    "estimate": "costs",
    "expand": "spec",
    "generate": "inference.generate",
    "load": "spec",
    "load_checkpoint": "checkpoint",
    "loads": "spec",
    "presets": "spec",
    "register": "spec",
    "save_checkpoint": "checkpoint",
    "tokenizer_of": "tokens",
}

__all__ = [
    "Engine",
    "Estimate",
    "ExtensionSpec",
    "Segments",
    "Sessions",
    "SpecError",
    "Stack",
    "StackBuilder",
    "StackModule",
    "StackSpec",
    "StackState",
    "Tape",
    "TextData",
    "build",
    "dump",
    "estimate",
    "expand",
    "generate",
    "load",
    "load_checkpoint",
    "loads",
    "presets",
    "register",
    "save_checkpoint",
    "tokenizer_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eulerstack' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
