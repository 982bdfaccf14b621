"""Main memory whose end is an error. Linux promises more than there is, and kills who takes it at its word.

With a limit, torch is told at once that there is no more; then `ldm.stepdown` finds a way that needs less, or
the user reads one line.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows, which promises only what it has
    resource = None


SYSTEM, STATUS = "/proc/meminfo", "/proc/self/status"
CONTAINER = Path("/sys/fs/cgroup")


@contextmanager
def bounded(device: torch.device) -> Iterator[None]:
    """Within the block, this process can have no more main memory than is free now.

    Nothing is limited for other devices than the CPU, or where the system is not Linux.
    """
    limit = _limit() if device.type == "cpu" else None
    if resource is None or limit is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _limit() -> int | None:
    """The bytes of its own that this process may have; None: the system does not tell."""
    found = free()
    return None if found is None else _fields(STATUS)["VmData"] + found + _fields(SYSTEM)["SwapFree"]


def free() -> int | None:
    """The bytes that this process could have beside those it has; None: the system does not tell."""
    with suppress(OSError, KeyError, ValueError):
        found = _fields(SYSTEM)["MemAvailable"]
        most = CONTAINER / "memory.max"
        if most.exists() and (text := most.read_text().strip()) != "max":
            counts = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
            used = int((CONTAINER / "memory.current").read_text())
            found = min(found, int(text) - used + int(counts["inactive_file"]))  # files give way
        return found
    return None


def resident() -> int:
    """The bytes of main memory that this process has. Raises OSError where the system does not tell."""
    return _fields(STATUS)["VmRSS"]


def _fields(path: str) -> dict[str, int]:
    """Those of a file of the system that are in kB, in bytes."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1:] == ["kB"]}
