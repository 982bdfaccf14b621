"""The layout of torch.save before version 1.6: five pickles in a row, then the storages.

A magic number, a protocol number, facts about the machine, the object itself, the keys of its storages;
then for each key the number of elements (8 bytes, little-endian) and the elements. `_legacy_save` in
https://github.com/pytorch/pytorch/blob/v2.10.0/torch/serialization.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats.mapped import MappedFile, printable
from ldm.formats.pickle_names import StorageRef
from ldm.formats.pickle_reader import Unpickler
from ldm.formats.rebuild import rebuild

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read_tree(file: MappedFile) -> Any:
    """The saved object, as inert data and tensors."""
    magic = Unpickler(file.data)
    if magic.load() != MAGIC:
        raise CheckpointError(
            "it is a plain Python pickle, not a checkpoint written by torch.save; get another file"
        )
    protocol = Unpickler(file.data, magic.at)
    if protocol.load() != PROTOCOL:
        raise CheckpointError(
            "it has an unknown version of torch's old format; save it again with a new torch"
        )
    machine = Unpickler(file.data, protocol.at)
    match machine.load():
        case {"little_endian": True}:
            pass
        case _:
            raise CheckpointError("it was written on a big-endian machine; convert it there")
    saved = Unpickler(file.data, machine.at)
    tree = saved.load()
    keys = Unpickler(file.data, saved.at)
    starts = find_storages(file, keys.load(), keys.at, saved.storages)

    def storage_bytes(storage: StorageRef) -> Tensor:
        return file.tensor(storage.dtype, starts[storage.key], storage.numel).view(torch.uint8)

    return rebuild(tree, storage_bytes)


def find_storages(file: MappedFile, keys: Any, at: int, storages: dict[str, StorageRef]) -> dict[str, int]:
    """Where the elements of each storage begin, from byte `at` up to the very end of the file."""
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or len(keys) != len(storages) or set(keys) != storages.keys():
        raise CheckpointError("its list of storages does not fit its tensors; do not use this file")
    starts = {}
    for key in keys:
        storage = storages[key]
        end = at + 8 + storage.numel * storage.dtype.itemsize
        if end > file.size:
            raise CheckpointError("the file is too short for its tensors; download it again")
        if int.from_bytes(file.data[at : at + 8], "little") != storage.numel:
            raise CheckpointError(
                f"its storage '{printable(key, 20)}' has not the size that is needed; do not use it"
            )
        starts[key] = at + 8
        at = end
    if at != file.size:
        raise CheckpointError(f"{file.size - at} bytes follow its last tensor; do not use this file")
    return starts
