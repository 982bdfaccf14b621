"""Writing files whole or not at all, keeping names inside their folder, and fingerprints of files."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from ldm.errors import LdmError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted: that serves as the lock
    fcntl = None

UNFINISHED = ".ldm-unfinished"  # the ending of a file that is still being written


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that becomes `path` when the block ends well, and vanishes when it does not.

    The bytes go to a file of a unique name in the same folder, reach the disk (fsync), and only then get
    their name, which reaches the disk too. A reader, a crash or a full disk never meets half a file.

    Raises LdmError if `path` exists and `overwrite` is False, even if it came into being meanwhile; OSError
    (a full disk, a missing folder) as it comes.
    """
    path = Path(path)
    exists = LdmError(f"{path.name} exists already; choose another name or allow overwriting it")
    if not overwrite and path.exists():
        raise exists
    file, unfinished = _create_beside(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames closed files only
            if overwrite:
                os.replace(unfinished, path)
            else:
                _rename_to_new(unfinished, path)
    except FileExistsError:
        raise exists from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
    _sync_folder(path.parent)


def remove_unfinished(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete what killed processes left of `atomic_write` in `folder`; files still being written stay."""
    removed = []
    for path in Path(folder).glob(f".*{UNFINISHED}"):
        with suppress(OSError), open(path, "rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.close()  # Windows deletes closed files only
            os.unlink(path)
            removed.append(path)
    return removed


def sha256(
    path: str | os.PathLike[str], *, start: int = 0, size: int = -1, progress: Callable[[int], object] = int
) -> str:
    """The hash of a file, or of `size` bytes of it from `start` on, in hexadecimal digits.

    progress: called with the number of bytes just read, as a checkpoint takes some seconds.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20 if size < 0 else min(1 << 20, size)):
            digest.update(block)
            progress(len(block))
            size -= len(block) if size >= 0 else 0
    return digest.hexdigest()


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """The path of `name` below the folder `root`, links followed.

    Raises LdmError if it would lie outside: an absolute name, "..", a link that leads away.
    """
    root = Path(root).resolve()
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    drive = PureWindowsPath(name).drive or PureWindowsPath(name).root
    if name and "\0" not in name and ".." not in parts and not drive:
        with suppress(OSError, RuntimeError):  # a loop of links
            path = (root / name).resolve()
            if path != root and path.is_relative_to(root):
                return path
    shown = "".join(c if c.isprintable() else "?" for c in name[:60])
    raise LdmError(f"the name '{shown}' leads outside its folder; give a plain file name")


def _create_beside(path: Path) -> tuple[BinaryIO, Path]:
    """A new locked file in the folder of `path`, and its name. Nobody else has or will have that name."""
    while True:
        unfinished = path.with_name(f".{secrets.token_hex(8)}{UNFINISHED}")
        file = open(unfinished, "xb")  # noqa: SIM115 (the caller closes it)
        if fcntl is None:
            return file, unfinished
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # remove_unfinished may have come between the two lines
            return file, unfinished
        file.close()


def _rename_to_new(unfinished: Path, path: Path) -> None:
    """Give the file its name. Raises FileExistsError if that is taken, which a plain rename would replace."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError:  # a drive without hard links: look, then rename
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(unfinished, path)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` reach the disk. Windows cannot, and does not need it."""
    if fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
