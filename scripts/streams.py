"""Standard output and standard error that may go away while the pictures go on.

What a program says is worth less than what it makes: a pipe that nobody reads any more (`| head -1`), a full
disk behind `> list.txt`, a stream that was closed from the start or a letter that its encoding does not have
shall cost no picture.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO


class Unfailing(io.FileIO):
    """A file that takes everything; `lost` is the last thing that went wrong."""

    lost: OSError | None = None

    def write(self, data) -> int:  # type: ignore[override]  (of bytes, as in the parent)
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            return memoryview(data).nbytes


def protect() -> None:
    """Make the standard streams of this process unfailing. Terminals stay as they are."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = unfailing(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = unfailing(sys.stderr)


def unfailing(stream: TextIO | None) -> TextIO:
    """The same stream, or one to nowhere for one that was closed (None)."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors="replace")
    if stream.isatty():
        return stream
    raw = Unfailing(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, errors="backslashreplace", line_buffering=True
    )


def full() -> bool:
    """Whether standard output is not whole. A reader that had enough (a closed pipe) has what it wanted."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, Unfailing) and raw.lost is not None and raw.lost.errno != errno.EPIPE
