"""Runs of many pictures that may end at any moment and go on from there (--resume).

The pictures themselves are the record. Each has its name from the start, and a file appears whole or not at
all (ldm/files.py): a picture is done if its file is there. What has to be written down beside them is only
which run they belong to, so that another one is not taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.errors import LdmError, RequestError
from ldm.files import atomic_write, fcntl
from ldm.images import next_number

MAX_RECORD = 1 << 20  # bytes
NAME = "run.json"  # of the record in the folder of the pictures


@contextmanager
def going_on(folder: Path, facts: Mapping[str, str]) -> Iterator[int]:
    """Within the block the run in this folder is ours alone; gives the number of its first picture.

    facts: what decides the pictures, by names for people ("number of pictures").
    Raises RequestError if the folder holds a run with other facts, or another process is at work on it.
    """
    path = folder / NAME
    if not path.exists():
        record = {"first": next_number(folder), "facts": dict(facts)}
        with suppress(LdmError), atomic_write(path) as file:  # another process may have been as quick
            file.write(json.dumps(record, indent=1).encode())
    with open(path, "rb") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"another process is at work on the run in {folder}") from None
        try:
            record = json.loads(file.read(MAX_RECORD))
            first, stored = int(record["first"]), dict(record["facts"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RequestError(f"{path} is damaged; start in another folder") from None
        changed = [name for name in facts if stored.get(name) != facts[name]]
        if changed:
            raise RequestError(
                f"{folder} holds a run with another {changed[0]}; give the old value, or another folder"
            )
        yield first


def digest(value: object) -> str:
    """A short stand-in for a value of plain data, for the record."""
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:16]
