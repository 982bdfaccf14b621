"""One weight file, opened once: its bytes as tensors over a private memory map, or read in small pieces."""

from __future__ import annotations

import mmap
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import CheckpointError

CHUNK = 1 << 18  # bytes held while a file is read from end to end
PREAD = hasattr(os, "pread")  # Windows has none
RELEASE = hasattr(mmap, "MADV_DONTNEED")  # nor this
POPULATE_READ = 22  # Linux' MADV_POPULATE_READ (5.14, 2021), for which mmap has no name


def printable(text: str, limit: int = 60) -> str:
    """`text` from an untrusted file, safe for a terminal: no control characters, at most `limit` long."""
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: Exception) -> str:
    """What the operating system said."""
    return printable(getattr(error, "strerror", None) or str(error))


class MappedFile:
    """A regular file and its copy-on-write memory map: writing to a tensor of it never changes the file.

    Everything is read through the one descriptor opened here, so a file renamed or replaced meanwhile does
    not matter: what was checked is what is used.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if there is no such file, or if it is a folder, a pipe or a device."""
        try:
            # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
            self._descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise CheckpointError("there is no such file; check the path") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise CheckpointError(f"it cannot be opened: {reason(error)}") from None
        try:
            self.data = self._map()
        except BaseException:
            os.close(self._descriptor)
            raise
        self.size = len(self.data)

    def _map(self) -> mmap.mmap:
        status = os.fstat(self._descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError("it is a folder; give the path of one weight file")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("it is not a regular file; give the path of one weight file")
        if status.st_size == 0:
            raise CheckpointError("the file is empty; download it again")
        try:
            return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, OverflowError) as error:
            raise CheckpointError(f"it cannot be read: {reason(error)}") from None

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the descriptor. The map lives on for as long as a tensor uses it."""
        os.close(self._descriptor)

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end` in pieces, not through the map: its pages would count as memory."""
        while start < end:
            size = min(CHUNK, end - start)
            piece = os.pread(self._descriptor, size, start) if PREAD else self.data[start : start + size]
            if not piece:
                raise CheckpointError("the file became shorter while it was read; try again")
            yield piece
            start += len(piece)

    def crc(self, start: int, end: int) -> int:
        """CRC-32 of the bytes from `start` to `end`."""
        crc = 0
        for piece in self.chunks(start, end):
            crc = zlib.crc32(piece, crc)
        return crc

    def tensor(self, dtype: torch.dtype, start: int, count: int) -> Tensor:
        """(count,) elements that begin at byte `start`. The caller has checked that they lie inside the file.

        No copy is made, unless the bytes are misaligned for `dtype`: torch's kernels expect aligned memory.
        """
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if start % dtype.itemsize == 0:
            return torch.frombuffer(self.data, dtype=dtype, count=count, offset=start)
        copy = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        target, done = copy.numpy(), 0
        for piece in self.chunks(start, start + len(target)):
            target[done : done + len(piece)] = memoryview(piece)
            done += len(piece)
        return copy.view(dtype)

    @contextmanager
    def read_once(self, tensor: Tensor) -> Iterator[None]:
        """While a tensor of this file is copied: all its pages come in at once, and are given back after it.

        Changes made to the tensor are lost then: it is read from the file again.
        """
        storage = tensor.untyped_storage()
        start = storage.data_ptr() - torch.frombuffer(self.data, dtype=torch.uint8, count=1).data_ptr()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (start + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - first
        inside = 0 <= start < self.size and size > 0  # a misaligned tensor was copied
        if inside and sys.platform == "linux":
            with suppress(OSError):  # an older system takes the page faults
                self.data.madvise(POPULATE_READ, first, size)
        yield
        if inside and RELEASE:
            self.data.madvise(mmap.MADV_DONTNEED, first, size)
