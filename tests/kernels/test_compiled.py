"""Loops are compiled wherever the package lies, also where nothing can be written."""

import pytest

numba = pytest.importorskip("numba")
compiled = pytest.importorskip("eulerstack.kernels.compiled")


def test_loops_are_compiled_where_no_folder_can_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container of read-only files, whose user has no home: Numba refused, and so did every stack."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "/proc/nowhere")
    made: dict[str, object] = {}
    exec(compile("def add(a, b): return a + b\ndef none(pointers): pass", "/proc/nowhere/loops.py", "exec"), made)
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(made["add"], cache=True)
    assert compiled.compiled(made["add"])(1, 2) == 3
    assert compiled.shared(made["none"])
