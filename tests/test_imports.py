"""Imports run one way."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "eulerstack"

MAY_IMPORT = {
    "spec": {"paths"},
    "segments": set(),
    "disk": set(),
    "paths": set(),
    "state": {"disk", "paths"},
    "detokenizer": set(),
    "tokens": {"detokenizer", "paths", "spec"},
    "kernels": {"segments"},
    "layers": {"kernels", "segments", "spec"},
    "mixers": {"kernels", "layers", "segments", "spec", "state"},
    "groups": {"spec"},
    "block": {"kernels", "layers", "mixers", "segments", "spec", "state"},
    "multitoken": {"block", "kernels", "layers", "segments", "spec"},
    "mup": {"layers", "spec"},
    "model": {"multitoken", "mup", "block", "groups", "kernels", "layers", "paths", "segments", "spec", "state"},
    "builder": {"model", "spec"},
    "testing": {"builder", "kernels", "mixers", "segments", "spec", "state"},
    "costs": {"block", "model", "spec"},
    "memory": {"block", "groups", "model", "segments", "spec"},
    "devices": set(),
    "stored": set(),
    "checkpoint": {"disk", "model", "paths", "spec", "stored", "tokens"},
    "inference": {"detokenizer", "kernels", "mixers", "model", "paths", "segments", "state", "tokens"},
    "data": {"disk", "paths", "segments", "tokens"},
    "training": {
        "block",
        "checkpoint",
        "data",
        "devices",
        "disk",
        "groups",
        "layers",
        "mixers",
        "model",
        "paths",
        "multitoken",
        "segments",
        "spec",
        "state",
    }
    | {"mup", "stored", "tokens"},
    "cli": {
        "checkpoint",
        "costs",
        "devices",
        "inference",
        "kernels",
        "memory",
        "paths",
        "spec",
        "stored",
        "tokens",
        "training",
    },
}
FOREIGN = {"lightning": {"training"}, "click": {"cli"}, "rich": {"cli"}, "tokenizers": {"detokenizer", "tokens"}}
FOREIGN |= {
    "pydantic": {"spec", "inference"},
    "fastapi": {"inference"},
    "starlette": {"inference"},
    "uvicorn": {"inference"},
}
FOREIGN |= {name: {"kernels"} for name in ("numba", "triton", "fla", "mamba_ssm", "causal_conv1d", "flash_attn")}
TORCH_FREE = {"paths", "spec", "stored"}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[tuple[int, str]]:
    """(level, dotted name) of every import statement, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(node.level, name) for name in names}
    return found


def files() -> list[Path]:
    return [f for f in sorted(PACKAGE.rglob("*.py")) if f.parent != PACKAGE or f.stem not in ("__init__", "__main__")]


def test_rooms_import_only_what_lies_below_them() -> None:
    for file in files():
        depth = len(file.relative_to(PACKAGE).parts)
        for level, name in imports(file):
            if level == depth:
                target = name.partition(".")[0]
                assert target == room(file) or target in MAY_IMPORT[room(file)], f"{file}: {name}"


def test_foreign_libraries_have_one_room() -> None:
    for file in files():
        for level, name in imports(file):
            library = name.partition(".")[0]
            if level == 0 and library in FOREIGN:
                assert room(file) in FOREIGN[library], f"{file}: {name}"
            if level == 0 and library in ("torch", "numpy"):
                assert room(file) not in TORCH_FREE, f"{file}: {name}"
