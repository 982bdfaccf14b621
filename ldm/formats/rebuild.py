"""From the records of a pickle to tensors over the storages' bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats.pickle_names import PARAMETER_DICT, Opaque, StorageRef, TensorRef

MAX_DEPTH = 100  # of nested containers


def rebuild(tree: Any, storage_bytes: Callable[[StorageRef], Tensor]) -> Any:
    """`tree` with tensors in place of records.

    storage_bytes: gives the bytes of a storage as (bytes,) uint8, exactly `numel` elements of them.
    Lists and dicts are changed in place.
    """
    storages: dict[str, Tensor] = {}
    done: dict[int, tuple[Any, Any]] = {}  # by identity: what is shared stays shared, and a cycle ends

    def tensor(ref: TensorRef) -> Tensor:
        if ref.storage.key not in storages:
            storages[ref.storage.key] = storage_bytes(ref.storage)
        return view(ref, storages[ref.storage.key])

    def walk(node: Any, depth: int) -> Any:
        if isinstance(node, TensorRef):
            return tensor(node)
        if not isinstance(node, (list, tuple, dict, Opaque)):
            return node
        if id(node) in done:
            return done[id(node)][1]
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"its data are nested over {MAX_DEPTH} deep, which no weight file needs; do not use this file"
            )
        if isinstance(node, tuple):
            result = tuple(walk(value, depth + 1) for value in node)
        else:
            result = node
            done[id(node)] = node, result
            if isinstance(node, list):
                node[:] = [walk(value, depth + 1) for value in node]
            elif isinstance(node, dict):
                for key, value in node.items():
                    node[key] = walk(value, depth + 1)
            else:
                node.args = walk(node.args, depth + 1)
                node.state = walk(node.state, depth + 1)
                if node.name == PARAMETER_DICT and isinstance(node.state, dict):
                    result = node.state.get("_parameters", node.state)
        done[id(node)] = node, result
        return result

    return walk(tree, 0)


def view(ref: TensorRef, raw: Tensor) -> Tensor:
    """The tensor `ref` over the storage's bytes `raw`, without a copy."""
    if 0 in ref.shape:
        return torch.empty(ref.shape, dtype=ref.dtype)
    whole = raw[: len(raw) // ref.dtype.itemsize * ref.dtype.itemsize]
    tensor = whole.view(ref.dtype).as_strided(ref.shape, ref.stride, ref.offset)
    if ref.conjugate:
        tensor = tensor.conj()
    if ref.negative:
        tensor = torch._neg_view(tensor)  # pyright: ignore[reportPrivateImportUsage]
    return tensor
