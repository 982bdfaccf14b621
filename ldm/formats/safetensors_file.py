"""The safetensors format by the letter: a checked header, then tensors over the memory map, and the writer.

Format: https://github.com/huggingface/safetensors#format. 8 bytes of header length N (little-endian), N bytes
of JSON that begin with "{", then the tensors' bytes without holes or overlaps up to the end of the file.

The header is scanned entry by entry instead of parsed as one JSON value, so that a hostile header of 100 MB
is refused at its first wrong token, before memory is spent on it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.files import atomic_write
from ldm.formats.mapped import MappedFile, printable

MAX_HEADER = 100_000_000  # the format's own limit
MAX_TENSORS = 50_000  # ours: over ten times the largest Stable Diffusion checkpoint with its EMA copy
MAX_METADATA = 16_000_000  # ours: LoRA trainers store their caption statistics here, up to a few MB
MAX_TEXT = 4_000_000  # ours: of one of them
MAX_ENTRY = 4096  # bytes of a tensor's name, and of its description
SPACE = re.compile(rb"[ \t\n\r]{0,4096}")  # what JSON takes for white space

DTYPES = {  # in the order in which the official library writes them: wide ones first keep all aligned
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of the header: its bytes are data[start:end], counted from the end of the header."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str


def is_plausible(file: MappedFile) -> bool:
    """Whether the file begins as a safetensors file does."""
    return file.data[8:9] == b"{" and int.from_bytes(file.data[:8], "little") <= MAX_HEADER


def read(file: MappedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (in the order of their bytes) and `__metadata__` of a file that claims to be safetensors."""
    if file.size < 10:
        raise CheckpointError("the file ends inside the safetensors header; download it again")
    length = int.from_bytes(file.data[:8], "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"the safetensors header claims {length} bytes, over the limit of {MAX_HEADER}; get another file"
        )
    begin = 8 + length
    if begin > file.size:
        raise CheckpointError("the file ends inside the safetensors header; download it again")
    entries, metadata = Header(file, begin).scan()
    if not entries:
        raise CheckpointError("it is a safetensors file without a tensor; download it again")
    check_cover(entries, file.size - begin)
    tensors = {e.name: file.tensor(e.dtype, begin + e.start, prod(e.shape)).reshape(e.shape) for e in entries}
    return tensors, metadata


def check_cover(entries: list[Entry], size: int) -> None:
    """Sort `entries` by their bytes and demand that they cover [0, size) exactly, each byte once."""
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = 0
    for entry in entries:
        if entry.start != position:
            what = "overlap" if entry.start < position else "leave a hole"
            raise CheckpointError(
                f"the bytes of its tensors {what} before '{printable(entry.name)}'; download the file again"
            )
        position = entry.end
    if position > size:
        raise CheckpointError(f"the file is {position - size} bytes too short; download it again")
    if position < size:
        raise CheckpointError(f"{size - position} bytes follow its last tensor; download it again")


def natural(digits: str) -> int:
    """A JSON integer, if it is not negative; "-0" is negative too."""
    if digits.startswith("-"):
        raise ValueError
    return int(digits)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, if no key is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_int=natural)


class Header:
    """A scanner over the header's bytes. Each method consumes one token, or raises CheckpointError."""

    def __init__(self, file: MappedFile, end: int) -> None:
        """Check that bytes 8 to `end` are UTF-8 and find where the padding after the JSON object begins."""
        self.data, self.at, self.end = file.data, 8, 8
        decoder, position = codecs.getincrementaldecoder("utf-8")(), 8
        try:
            for piece in file.chunks(8, end):
                decoder.decode(piece)
                if written := len(piece.rstrip(b" \t\n\r")):
                    self.end = position + written
                position += len(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise self.error("it is not UTF-8") from None

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"not a valid safetensors header: {what}; download the file again")

    def scan(self) -> tuple[list[Entry], dict[str, str]]:
        if self.data[8:9] != b"{":
            raise self.error("it does not begin with '{'")
        entries: list[Entry] = []
        names: set[str] = set()
        metadata: dict[str, str] = {}
        for name in self.keys(MAX_ENTRY):
            if name in names:
                raise self.error(f"'{printable(name)}' is there twice")
            names.add(name)
            if name == "__metadata__":
                metadata = self.metadata()
            else:
                entries.append(self.entry(name))
            if len(entries) > MAX_TENSORS:
                raise self.error(f"over {MAX_TENSORS} tensors")
        if self.at != self.end:
            raise self.error("something follows its JSON object")
        return entries, metadata

    def keys(self, limit: int) -> Iterator[str]:
        """Step through an object: yield each key, with the scanner before its value."""
        self.token(b"{")
        if self.peek() == b"}":
            return self.token(b"}")
        while True:
            key = self.string(limit)
            self.token(b":")
            yield key
            if self.peek() == b"}":
                return self.token(b"}")
            self.token(b",")

    def metadata(self) -> dict[str, str]:
        found: dict[str, str] = {}
        start = self.at
        for key in self.keys(MAX_ENTRY):
            if key in found:
                raise self.error(f"the metadata '{printable(key)}' is there twice")
            found[key] = self.string(MAX_TEXT)
            if self.at - start > MAX_METADATA:
                raise self.error(f"over {MAX_METADATA} bytes of metadata")
        return found

    def entry(self, name: str) -> Entry:
        self.space()
        try:
            value, length = self.decode(MAX_ENTRY)
        except (ValueError, RecursionError):
            value, length = None, 0
        self.at += length
        match value:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]}:
                if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
                    raise self.error(
                        f"'{printable(name)}' has a shape or offset that is not a natural number"
                    )
            case _:
                raise self.error(f"'{printable(name)}' is not described by dtype, shape and data_offsets")
        if dtype not in DTYPES:
            raise CheckpointError(
                f"'{printable(name)}' has the type {printable(dtype, 20)}, which ldm does not know"
            )
        if len(shape) > 64 or prod(n or 1 for n in shape) >= 1 << 63:
            raise self.error(f"the shape of '{printable(name)}' is too large")
        if end - start != prod(shape) * DTYPES[dtype].itemsize:
            raise self.error(f"the shape of '{printable(name)}' does not fit its {end - start} bytes")
        return Entry(start, end, DTYPES[dtype], tuple(shape), name)

    def string(self, limit: int) -> str:
        """A JSON text of at most `limit` bytes."""
        if self.peek() != b'"':
            raise self.error("a text is expected")
        window = min(MAX_ENTRY, limit)
        while True:
            try:
                _, length = self.decode(window)
                break
            except ValueError:
                if window == limit:
                    raise self.error("a text does not end, is too long or not valid JSON") from None
                window = min(16 * window, limit)
        raw = self.data[self.at : self.at + length]
        self.at += length
        text = json.loads(raw.decode())
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self.error("a text has half a surrogate pair") from None
        return text

    def decode(self, window: int) -> tuple[Any, int]:
        """The JSON value that begins here and ends within `window` bytes, and its length in bytes.

        Latin-1 makes one character of a byte: right for the length, and for a value that is ASCII.
        """
        return DECODER.raw_decode(self.data[self.at : min(self.at + window, self.end)].decode("latin-1"))

    def token(self, wanted: bytes) -> None:
        if self.peek() != wanted:
            raise self.error(f"'{wanted.decode()}' is expected at byte {self.at}")
        self.at += 1

    def peek(self) -> bytes:
        self.space()
        return self.data[self.at : min(self.at + 1, self.end)]

    def space(self) -> None:
        if blank := SPACE.match(self.data, self.at, self.end):
            self.at = blank.end()


def write(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write `tensors` to `path`, whole or not at all, one tensor in memory at a time.

    Byte for byte the file that the official library writes for at most one metadata entry: wider types first
    (so that every tensor is aligned), then by name. Raises LdmError if `path` exists and `overwrite` is
    False.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"'{name}' is {tensor.dtype}, which safetensors cannot hold; convert it first"
            )
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise CheckpointError("the metadata of a safetensors file are texts; convert them first")
    rank = {dtype: number for number, dtype in enumerate(DTYPE_NAMES)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.dtype.itemsize
        offsets = [position, end]
        dtype = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            whole = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            # One element may have any stride and count as contiguous, but bytes want a stride of 1.
            flat = whole.as_strided((whole.numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)
