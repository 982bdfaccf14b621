"""Reading and writing weight files: what a file holds, safely, and nothing converted yet.

The content decides what a file is, whatever its name; only a file named .safetensors is never read as a
pickle. No file can run code: see pickle_reader.py, and SECURITY.md for what is promised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats import legacy, safetensors_file, zip_reader
from ldm.formats.mapped import MappedFile, printable
from ldm.formats.pickle_names import Opaque
from ldm.formats.safetensors_file import write as write_safetensors

__all__ = ["Opaque", "WeightFile", "read", "read_tree", "write_safetensors"]

MAX_NODES = 300_000  # dict entries visited in search of tensors
MAX_NAME = 1000  # characters of a tensor's name

ZIP = b"PK\3\4"
PICKLE = (b"\x80", b"L119547037146038801333356L")  # protocol 2 and later; torch's magic number in protocol 1

# What people give or download by accident, by its first bytes in lower case.
MISTAKES = {
    (b"<!doctype", b"<html", b"<?xml", b"<!--"): "it is a web page, not weights; download the file itself",
    (b"version https://git-lfs",): "it is a git-lfs pointer, not the weights; run `git lfs pull`",
    (b"{", b"["): "it is a JSON text, not weights; download the file itself",
    (b"gguf",): "it is a GGUF file, which ldm does not read; get the .safetensors",
    (b"\x89hdf",): "it is an HDF5 (Keras) file, which ldm does not read; get the .safetensors",
    (b"\x93numpy",): "it is a numpy array, which ldm does not read; get the .safetensors",
    (
        b"\x1f\x8b",
        b"7z\xbc\xaf",
        b"rar!",
        b"\xfd7zxz",
        b"bzh",
        b"\x28\xb5\x2f\xfd",
    ): "it is packed; unpack it first",
    (
        b"\x89png",
        b"\xff\xd8\xff",
        b"gif8",
        b"riff",
        b"%pdf",
    ): "it is a picture or document, not weights; check the path",
    (b"\0\0\0\0\0\0\0\0",): "it begins with zeros; the download is incomplete, repeat it",
}


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds, nothing converted yet.

    tensors: by flat name, dtypes as stored. They share a private memory map of the file where its layout
    allows: loading costs no second copy, and writing to them never changes the file. metadata:
    `__metadata__` of a safetensors file; epoch, global_step and version of a Lightning checkpoint.
    read_once: around the copying of a tensor, saves time and memory, see MappedFile.read_once.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    read_once: Callable[[Tensor], AbstractContextManager[None]]


def read(path: str | os.PathLike[str]) -> WeightFile:
    """The tensors of a .safetensors file or of a checkpoint written by torch.save, zip or legacy.

    A checkpoint's tensors are those under "state_dict" if it has one, else all, named by their keys joined
    with dots. Raises CheckpointError, one line that names the file, for whatever is damaged, hostile or
    something else.
    """
    path = Path(path)
    with _naming(path), MappedFile(path) as file:
        tree, metadata = _load(path, file)
        return WeightFile(path, _flat(tree), metadata, file.read_once)


def read_tree(path: str | os.PathLike[str]) -> Any:
    """The nested structure of a weight file: dicts, lists, tensors, plain values; Opaque for other objects.

    Raises CheckpointError as `read` does.
    """
    path = Path(path)
    with _naming(path), MappedFile(path) as file:
        return _load(path, file)[0]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before the message of an error, and keep that one printable line."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(printable(f"{printable(path.name or str(path))}: {error}", 200)) from None


def _load(path: Path, file: MappedFile) -> tuple[Any, dict[str, str]]:
    """The structure and the metadata of a weight file of any kind, which its first bytes tell."""
    named_safetensors = path.suffix.lower() == ".safetensors"
    # Asked first: the length at the start of a safetensors file may begin with 0x80, as a pickle does.
    safetensors = safetensors_file.is_plausible(file)
    pickled = not safetensors and (file.data[:4] == ZIP or file.data[:30].startswith(PICKLE))
    if pickled and named_safetensors:
        raise CheckpointError("it is named .safetensors but holds a pickle; rename it to .ckpt")
    if pickled:
        tree = (zip_reader if file.data[:4] == ZIP else legacy).read_tree(file)
        return tree, _lightning_metadata(tree)
    if not safetensors:
        beginning = file.data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        for starts, what in MISTAKES.items():
            if beginning.startswith(starts):
                raise CheckpointError(what)
        if not named_safetensors:
            raise CheckpointError(
                "it is neither a .safetensors file nor a checkpoint written by torch.save; check the path"
            )
    return safetensors_file.read(file)


def _lightning_metadata(tree: Any) -> dict[str, str]:
    keys = ("epoch", "global_step", "pytorch-lightning_version")
    found = {key: tree.get(key) for key in keys} if isinstance(tree, dict) else {}
    return {key: str(value) for key, value in found.items() if isinstance(value, (int, str))}


def _flat(tree: Any) -> dict[str, Tensor]:
    """The tensors in nested dicts, by their keys joined with dots."""
    if isinstance(tree, Opaque):
        raise CheckpointError("it holds a whole Python object; save its state_dict() instead")
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    if not isinstance(tree, dict):
        raise CheckpointError("it holds no named tensor; give a file of weights")
    found: dict[str, Tensor] = {}
    todo, visited = [("", tree)], 0
    while todo:
        name, node = todo.pop()
        if isinstance(node, Tensor):
            if name in found:
                raise CheckpointError(f"the tensor '{printable(name)}' is there twice; do not use this file")
            found[name] = node
        elif isinstance(node, dict):
            keys = [key for key in node if isinstance(key, (str, int))]
            visited += len(keys)
            prefix = f"{name}." if name else ""
            if visited > MAX_NODES or len(name) + max(map(len, map(str, keys)), default=0) > MAX_NAME:
                raise CheckpointError(
                    "its data are nested more, or named longer, than weights need; do not use this file"
                )
            todo += [(f"{prefix}{key}", node[key]) for key in reversed(keys)]
    if not found:
        raise CheckpointError("it holds no named tensor; give a file of weights")
    return found
