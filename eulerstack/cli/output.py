"""Standard output and standard error end no verb: their reader may leave, and a name may hold any character."""

import io
import os
import sys
from typing import Any, TextIO


class Outlet(io.FileIO):
    """Bytes to a file descriptor. When it refuses some, these and all that follow are dropped; `refusal` says why."""

    refusal: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Raises nothing: a training goes on when nobody reads what it prints."""
        if self.refusal is None:
            try:
                return super().write(data)
            except OSError as error:
                self.refusal = error
        return len(data)


def replace_streams() -> Outlet:
    """Put outlets behind sys.stdout and sys.stderr for the rest of the process. Returns that of sys.stdout.

    What the stream's encoding lacks is written as `?`. A stream that was closed before the process began becomes the
    null device; or else the next file that is opened would get its number, and what is printed.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - as long as the process
    out = _outlet(sys.stdout)
    sys.stdout = _text(out, sys.stdout, "replace")
    sys.stderr = _text(_outlet(sys.stderr), sys.stderr, "backslashreplace")
    return out


def _outlet(stream: TextIO | None) -> Outlet:
    number = os.open(os.devnull, os.O_WRONLY) if stream is None else stream.fileno()
    return Outlet(number, "w", closefd=False)


def _text(outlet: Outlet, before: TextIO | None, errors: str) -> io.TextIOWrapper:
    """The outlet as a text stream that buffers as the one before it did."""
    at_once: bool = getattr(before, "write_through", False)
    by_lines: bool = getattr(before, "line_buffering", False)
    encoding = "utf-8" if before is None else before.encoding
    buffer: Any = outlet if at_once else io.BufferedWriter(outlet)
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=by_lines, write_through=at_once)


def end_code(out: Outlet) -> int:
    """Write what is buffered. Returns 2, with a sentence, where the output was refused; 0 if its reader had left."""
    sys.stdout.flush()
    if out.refusal is None or isinstance(out.refusal, ConnectionError):
        return 0
    print(f"the output cannot be written: {out.refusal.strerror}; what was printed is lost", file=sys.stderr)
    return 2


def is_dropped(stream: TextIO) -> bool:
    """Whether what is written to the stream goes nowhere any more."""
    outlet = getattr(stream.buffer, "raw", stream.buffer)
    return isinstance(outlet, Outlet) and outlet.refusal is not None
