"""Zip archives, read from their central directory, and the checkpoints that torch.save packs into them.

A checkpoint is NAME/data.pkl, NAME/data/0, NAME/data/1, ... (one member per storage) and a few small members.
Only these are interpreted; the rest of the archive must be sound, but is not looked into.

Zip: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections in brackets. Two readers that
differ on a malformed archive are how hostile files pass a check, so whatever could be read in two ways is
refused: local headers that contradict the directory, members that overlap or share a name, bytes before the
first or after the end.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats.mapped import MappedFile, printable
from ldm.formats.pickle_names import StorageRef
from ldm.formats.pickle_reader import Unpickler
from ldm.formats.rebuild import rebuild

LOCAL = struct.Struct("<4s5H3L2H")  # [4.3.7]
CENTRAL = struct.Struct("<4s6H3L5H2L")  # [4.3.12]
END64 = struct.Struct("<4sQ2H2L4Q")  # [4.3.14]
LOCATOR64 = struct.Struct("<4sLQL")  # [4.3.15]
END = struct.Struct("<4s4H2LH")  # [4.3.16]
STORED, DEFLATED = 0, 8
SIZES_FOLLOW = 1 << 3  # the local header may leave CRC and sizes to a record after the data
USUAL = SIZES_FOLLOW | 1 << 1 | 1 << 2 | 1 << 11  # flags of compression effort and of UTF-8 names
SATURATED = 0xFFFFFFFF  # of a 32-bit field: the value is in the zip64 extra field
WORTH_A_THREAD = 1 << 26  # bytes to check
MAX_MEMBERS = 50_000
MAX_NAME = 500
MAX_PICKLE = 16_000_000
MAX_INFLATED = 32_000_000  # bytes of the storages, beside 16 times the file: weights hardly compress


class Member(NamedTuple):
    """One file of the archive: its packed bytes are [start, end), its local header begins at `header`."""

    header: int
    start: int
    end: int
    name: str
    size: int
    crc: int
    method: int
    unusual: bool


def read_tree(file: MappedFile) -> Any:
    """The object that torch.save packed, as inert data and tensors."""
    members = read_directory(file)
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if not pickles:
        raise CheckpointError("it is a zip archive, but no checkpoint; if weights are inside, unpack it")
    if len(pickles) > 1:
        raise CheckpointError("it is a zip archive with several data.pkl; do not use this file")
    [name] = pickles
    folder = name.removesuffix("data.pkl")
    if order := members.get(f"{folder}byteorder"):
        check_little_endian(unpacked(file, order, limit=10))
    pickled = Unpickler(unpacked(file, members[name], MAX_PICKLE))
    tree = pickled.load()
    found = {key: find_storage(members, folder, storage) for key, storage in pickled.storages.items()}
    if sum(member.size for member in found.values()) > MAX_INFLATED + 16 * file.size:
        raise CheckpointError("it unpacks to far more than weights can; do not use this file")
    check_stored(file, members.values())

    def storage_bytes(storage: StorageRef) -> Tensor:
        member = found[storage.key]
        if member.method == DEFLATED and storage.numel:
            return torch.frombuffer(inflate(file, member), dtype=torch.uint8)
        return file.tensor(storage.dtype, member.start, storage.numel).view(torch.uint8)

    return rebuild(tree, storage_bytes)


def find_storage(members: dict[str, Member], folder: str, storage: StorageRef) -> Member:
    """The member that holds a storage, and holds exactly that many bytes."""
    member = members.get(f"{folder}data/{storage.key}")
    if member is None or not re.fullmatch("[0-9]+", storage.key):
        raise CheckpointError(f"its storage '{printable(storage.key, 20)}' is missing; download it again")
    size = storage.numel * storage.dtype.itemsize
    if member.size != size:
        raise CheckpointError(
            f"its storage {storage.key[:20]} has {member.size} bytes instead of {size}; do not use this file"
        )
    check_readable(member)
    return member


def read_directory(file: MappedFile) -> dict[str, Member]:
    """The members by name. Raises CheckpointError if the archive could be read in two ways."""
    count, start, end = find_directory(file)
    if count > MAX_MEMBERS:
        raise damaged()
    members: list[Member] = []
    at = start
    for _ in range(count):
        member, at = read_member(file, at, end)
        members.append(member)
    if at != end:
        raise damaged()
    position = 0
    for member in sorted(members):
        if member.header < position or (position == 0 and member.header > 0):
            raise CheckpointError(
                "the members of the zip archive overlap or do not begin it; do not use this file"
            )
        position = member.end
    if position > start:
        raise damaged()
    if len({member.name.casefold() for member in members}) < count:
        raise CheckpointError("the zip archive has two members of one name; do not use this file")
    return {member.name: member for member in members}


def find_directory(file: MappedFile) -> tuple[int, int, int]:
    """Number of members, begin and end of the central directory, from the record that ends the archive."""
    tail = max(0, file.size - END.size - 0xFFFF)
    ends = []  # the record may be followed by a comment, whose length it tells
    at = file.data.find(b"PK\5\6", tail)
    while 0 <= at <= file.size - END.size:
        if at + END.size + END.unpack_from(file.data, at)[7] == file.size:
            ends.append(at)
        at = file.data.find(b"PK\5\6", at + 1)
    if len(ends) != 1:
        raise CheckpointError("the zip archive has no proper end; the file is incomplete, download it again")
    [end] = ends
    _, *disks, here, count, size, start, _ = END.unpack_from(file.data, end)
    narrow = (here, count, size, start)
    at = end - LOCATOR64.size
    if at >= 0 and file.data[at : at + 4] == b"PK\6\7":
        _, _, end, _ = LOCATOR64.unpack_from(file.data, at)
        if end + END64.size > at:
            raise damaged()
        signature, length, _, _, *disks, here, count, size, start = END64.unpack_from(file.data, end)
        limits = (0xFFFF, 0xFFFF, SATURATED, SATURATED)
        wide = (here, count, size, start)
        agree = all(n in (w, limit) for n, w, limit in zip(narrow, wide, limits, strict=True))
        if signature != b"PK\6\6" or end + 12 + length != at or not agree:
            raise damaged()
    if any(disks) or here != count or start + size != end:
        raise damaged()
    return count, start, end


def read_member(file: MappedFile, at: int, end: int) -> tuple[Member, int]:
    """The member whose entry in the directory begins at byte `at`, and where the next entry begins."""
    if at + CENTRAL.size > end:
        raise damaged()
    fields = CENTRAL.unpack_from(file.data, at)
    signature, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, _, _, _, header = fields
    at += CENTRAL.size
    following = at + named + extra + comment
    if signature != b"PK\1\2" or following > end or not 0 < named <= MAX_NAME:
        raise damaged()
    raw = file.data[at : at + named]
    size, packed, header = widened(file.data[at + named : at + named + extra], size, packed, header)

    if header + LOCAL.size > file.size:
        raise damaged()
    signature, _, *local, local_named, local_extra = LOCAL.unpack_from(file.data, header)
    local_flags, local_method, _, _, local_crc, local_packed, local_size = local
    start = header + LOCAL.size + local_named + local_extra
    local_raw = file.data[header + LOCAL.size : header + LOCAL.size + local_named]
    sizes = widened(file.data[start - local_extra : start], local_size, local_packed)
    agree = (sizes, local_crc) == ((size, packed), crc) or (
        flags & SIZES_FOLLOW and (sizes, local_crc) == ((0, 0), 0)
    )
    if signature != b"PK\3\4" or (local_raw, local_flags, local_method) != (raw, flags, method) or not agree:
        raise CheckpointError("the zip archive contradicts its own directory; do not use this file")
    if method == STORED and size != packed:
        raise damaged()
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise damaged() from None
    return Member(header, start, start + packed, name, size, crc, method, bool(flags & ~USUAL)), following


def widened(extra: bytes, *values: int) -> tuple[int, ...]:
    """`values`, those that did not fit 32 bits taken from the zip64 extra field [4.5.3]."""
    if SATURATED not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and 8 * values.count(SATURATED) <= length <= len(extra) - at - 4:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return tuple(next(wide) if n == SATURATED else n for n in values)
        at += 4 + length
    raise damaged()


def check_readable(member: Member) -> None:
    if member.unusual or member.method not in (STORED, DEFLATED):
        raise CheckpointError("the zip archive is encrypted or packed in an unusual way; unpack it first")


def check_little_endian(order: bytes | bytearray) -> None:
    if order != b"little":
        raise CheckpointError("it was written on a big-endian machine; convert it there")


def check_stored(file: MappedFile, members: Iterable[Member]) -> None:
    """Compare the CRC-32 of every stored member, known or not: damage anywhere is seen."""
    stored = [member for member in members if member.method == STORED]
    workers = min(os.cpu_count() or 1, 1 + file.size // WORTH_A_THREAD)

    def first_damaged(share: list[Member]) -> Member | None:
        return next((m for m in share if file.crc(m.start, m.end) != m.crc), None)

    with ThreadPoolExecutor(workers) as threads:
        for member in threads.map(first_damaged, [stored[i::workers] for i in range(workers)]):
            if member:
                raise CheckpointError(f"{printable(member.name)} inside it is damaged; download it again")


def unpacked(file: MappedFile, member: Member, limit: int) -> bytes | bytearray:
    """The bytes of a small member, checked."""
    check_readable(member)
    if member.size > limit:
        raise CheckpointError(
            f"{printable(member.name)} inside it has {member.size} bytes, far too many; do not use this file"
        )
    raw = inflate(file, member) if member.method == DEFLATED else file.data[member.start : member.end]
    if zlib.crc32(raw) != member.crc:
        raise CheckpointError(f"{printable(member.name)} inside it is damaged; download it again")
    return raw


def inflate(file: MappedFile, member: Member) -> bytearray:
    """The unpacked bytes of a deflated member: never more than its declared size."""
    inflater, raw = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    with suppress(zlib.error):  # the stream has no end, then
        for piece in file.chunks(member.start, member.end):
            raw += inflater.decompress(piece, member.size + 1 - len(raw))
            if len(raw) > member.size:
                break
    if not inflater.eof or inflater.unused_data or len(raw) != member.size or zlib.crc32(raw) != member.crc:
        raise CheckpointError(f"{printable(member.name)} inside it is damaged; download it again")
    return raw


def damaged() -> CheckpointError:
    return CheckpointError("the zip archive is damaged; download it again")
