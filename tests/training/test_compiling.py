"""torch.compile of the layers: the same numbers, names and resumption as without; or a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import eulerstack as es
from eulerstack.training import compiling
from eulerstack.training.compiling import compile_blocks
from eulerstack.training.keeping import WholeFiles

from .conftest import QUIET
from .test_ranks import WAYS, launched, same, stack

pytestmark = [
    pytest.mark.usefixtures("lightnings_own_warnings"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(outputs["loss"].item())


@pytest.fixture
def losses(stack_file: Path, corpus: Path, tmp_path: Path) -> Callable[..., list[float]]:
    """Those of each step of a run; the state after it is in NAME.ckpt."""

    def fit(name: str, steps: int, resume: str | None = None, **options: Any) -> list[float]:
        L.seed_everything(0, verbose=False)
        told = Losses()
        made = L.Trainer(
            max_steps=steps,
            limit_val_batches=0,
            callbacks=[told],
            default_root_dir=tmp_path,
            plugins=[WholeFiles()],
            **QUIET,
        )
        data = es.TextData(str(corpus), seq_len=32, batch_size=4, cache_dir=str(tmp_path / "cache"), packing="packed")
        module = es.StackModule(str(stack_file), schedule="constant", kernels="torch", **options)
        made.fit(module, data, ckpt_path=None if resume is None else tmp_path / f"{resume}.ckpt", weights_only=True)
        made.save_checkpoint(tmp_path / f"{name}.ckpt")
        return told.seen

    return fit


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of what it does itself
@pytest.mark.parametrize("policy", ["none", "selective", "block"])
def test_compiled_layers_train_and_resume_as_others_do(policy: str, losses: Callable[..., list[float]]) -> None:
    plain = losses("plain", 6, checkpointing=policy)
    whole = losses("whole", 6, checkpointing=policy, compile=True)
    assert whole == pytest.approx(plain, abs=1e-5)
    assert losses("half", 3, checkpointing=policy, compile=True) == whole[:3]
    assert losses("rest", 6, "half", checkpointing=policy, compile=True) == whole[3:]
    assert losses("eager", 6, "half", checkpointing=policy) == pytest.approx(whole[3:], abs=1e-5)


def test_loops_of_numba_are_refused_with_the_fix(stack_file: Path) -> None:
    pytest.importorskip("numba")
    with pytest.raises(ValueError, match=r"kernels of .*ssd are compiled by Numba already.*add --model\.kernels torch"):
        es.StackModule(str(stack_file), compile=True).configure_model()


def test_no_compiler_is_a_sentence(stack_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise compiling.InvalidCxxCompiler

    monkeypatch.setattr(compiling, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and there is none: install g\+\+"):
        es.StackModule(str(stack_file), kernels="torch", compile=True).configure_model()


def test_names_stay_and_experts_are_left_alone() -> None:
    spec = es.load("arch_expert_mixtral_moe_mini")
    plain, model = es.build(spec, kernels="torch"), es.build(spec, kernels="torch")
    compile_blocks(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    for block in model.blocks:
        assert getattr(block.ffn.forward, "_torchdynamo_disable", False)
        assert block._compiled_call_impl is not None


@pytest.mark.slow
def test_compiled_layers_on_two_ranks_train_and_resume(tmp_path: Path) -> None:
    """Names and shapes in the sharded checkpoint are those of one process, whose layers are not compiled."""
    case: dict[str, Any] = {"spec": stack("attention", "retnet"), "steps": 2, "strategy": "auto"}
    one = launched(tmp_path / "one", [{**case, "name": "one", "steps": 3}], 1)["one"]
    case["options"] = {"compile": True, "kernels": "torch"}
    cases = []
    for name, way in WAYS.items():
        cases.append({**case, **way, "name": name, "save": f"{name}.ckpt"})
        cases.append({**case, **way, "name": f"{name}-on", "steps": 3, "resume": f"{name}.ckpt", "gradients": False})
    found = launched(tmp_path / "two", cases, 2)
    for name in WAYS:
        first, rest = found[name], found[f"{name}-on"]
        same(one, {**rest, "losses": first["losses"] + rest["losses"], "grads": first["grads"]}, 1e-9)
