"""The pieces of which weight files are built byte by byte in tests, good ones and bad ones."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Sequence

PROTO2, PROTO4, STOP = b"\x80\x02", b"\x80\x04", b"."
FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def value(data: object) -> bytes:
    """The opcodes that push plain data."""
    return pickle.dumps(data, 2)[2:-1]


def storage(key: object = "0", numel: object = 4, kind: str = "FloatStorage", extra: bytes = b"") -> bytes:
    return (
        b"(" + text("storage") + name("torch", kind) + value(key) + text("cpu") + value(numel) + extra + b"tQ"
    )


def tensor(
    stored: bytes | None = None,
    offset: object = 0,
    shape: object = (4,),
    stride: object = (1,),
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    stored = storage() if stored is None else stored
    numbers = value(offset) + value(shape) + value(stride)
    return name("torch._utils", function) + b"(" + stored + numbers + b"\x89NtR"


def state_dict(*tensors: bytes) -> bytes:
    pairs = b"".join(text(f"t{i}") + tensor for i, tensor in enumerate(tensors))
    return PROTO2 + b"}(" + pairs + b"u" + STOP


def zipped(
    pickled: bytes,
    members: dict[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
    folder: str = "a/",
) -> bytes:
    """A checkpoint as torch.save lays it out since 1.6, with one storage of four floats."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.writestr(f"{folder}data.pkl", pickled)
        for member, data in ({"data/0": FLOATS} if members is None else members).items():
            archive.writestr(folder + member, data)
    return target.getvalue()


def legacy(
    pickled: bytes,
    storages: Sequence[bytes] = (FLOATS,),
    keys: object = ("0",),
    machine: object = {"little_endian": True},
) -> bytes:
    """A checkpoint as torch.save laid it out before 1.6."""
    head = b"".join(pickle.dumps(o, 2) for o in (0x1950A86A20F9469CFC6C, 1001, machine))
    tail = pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2)
    return head + pickled + tail + b"".join(struct.pack("<q", len(s) // 4) + s for s in storages)


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def patched(data: bytes, at: int, raw: bytes) -> bytes:
    return data[:at] + raw + data[at + len(raw) :]


def entries(content: bytes) -> list[int]:
    """Where the entries of the directory begin."""
    at, found = content.index(b"PK\1\2"), []
    while content[at : at + 4] == b"PK\1\2":
        found.append(at)
        at += 46 + sum(struct.unpack_from("<3H", content, at + 28))
    return found


def both(content: bytes, entry: int, at: int, raw: bytes) -> bytes:
    """`raw` in an entry of the directory and in the local header, whose fields lie two bytes earlier."""
    header = struct.unpack_from("<L", content, entry + 42)[0]
    return patched(patched(content, entry + at, raw), header + at - 2, raw)
