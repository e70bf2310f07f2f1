"""The resume point written by a thread, beside the training."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from .keeping import WholeFiles


class Writer:
    """A thread that does one write at a time; the next waits for it."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def begin(self, write: Callable[..., None], *arguments: Any) -> None:
        """Once nothing else is written. Raises what the writing before raised, if nobody has waited for it."""
        self.wait()
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._thread.submit(write, *arguments)

    def wait(self) -> bool:
        """Returns when the last write has ended, whether there was one. Raises what it raised, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        return writing is not None

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


class InBackground(WholeFiles):
    """`WholeFiles` whose writes do not hold up the steps: they wait for a copy in this machine's memory alone.

    Lightning's AsyncCheckpointIO copies on the device that trains, and lets writes queue up, each with its copy. Here
    one is written at a time, and the next waits for it. What goes wrong is raised by the next save or load, or when the
    run ends, which waits for the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writer = Writer()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        copied = apply_to_collection(checkpoint, Tensor, _copied)
        self._writer.begin(super().save_checkpoint, copied, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(path, *args, **kwargs)

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk. Raises what its writing raised, once."""
        self._writer.wait()

    def teardown(self) -> None:
        self._writer.close()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
