"""Random damage to good files: each outcome is tensors or one CheckpointError, in little time.

`python -m tests.hostile.fuzz SECONDS [SEED]` looks for longer than the tests do, and writes what it finds. A
third of the time is for sound files with other weights than a reader expects, see readers.py.
"""

from __future__ import annotations

import io
import logging
import random
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import torch

from ldm import formats
from ldm.errors import CheckpointError, LdmError
from ldm.formats.pickle_reader import OPCODES
from tests.hostile.build import FLOATS, legacy, name, safetensors, state_dict, tensor, text, zipped
from tests.hostile.readers import altered, readers, save

SECONDS = 2.0  # of processor time for one file
NAMES = (
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "collections OrderedDict",
    "ldm.x Y",
    "torch float16",
)
NAMES += ("torch._utils _rebuild_parameter", "_codecs encode", "torch Size", "builtins set", "numpy dtype")
NUMBERS = (0, 1, 4, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\u0000",
    b"null",
    b"true",
    b"-1",
    b"1e9",
    b'"shape"',
    b'"F32"',
]
TOKENS += [b'"data_offsets"', b'"__metadata__"', b" ", b"\xff", b"\\", *(str(n).encode() for n in NUMBERS)]


def saved(**options: bool) -> bytes:
    target = io.BytesIO()
    torch.save(
        {"state_dict": {"a": torch.arange(3.0), "b": torch.ones(2, 2).half().t()}, "epoch": 1},
        target,
        **options,
    )
    return target.getvalue()


GOOD_PICKLE = state_dict(tensor(), tensor(shape=(2, 2), stride=(1, 2)))
GOOD_HEADER = b'{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
GOOD_FILES = (
    zipped(GOOD_PICKLE),
    zipped(GOOD_PICKLE, method=zipfile.ZIP_DEFLATED),
    legacy(GOOD_PICKLE),
    saved(),
    saved(_use_new_zipfile_serialization=False),
    safetensors(GOOD_HEADER, FLOATS),
)


def mutated(rng: random.Random, data: bytes, tokens: list[bytes] | None = None) -> bytes:
    """`data` with a few bytes changed, removed, repeated, moved or put in."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(raw) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 20))
        match rng.randrange(6):
            case 0:
                raw[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del raw[at : at + size]
            case 2:
                raw[at:at] = raw[at : at + size] * rng.choice((1, 2, 50))
            case 3:
                source = rng.randrange(len(raw) + 1)
                raw[at : at + size] = raw[source : source + size]
            case 4:
                raw[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
            case 5:
                raw[at:at] = rng.choice(tokens) if tokens else bytes([rng.choice(list(OPCODES))])
    return bytes(raw)


def program(rng: random.Random) -> bytes:
    """A pickle of random opcodes with fitting arguments."""
    pieces = [b"\x80\x02"]
    for _ in range(rng.randrange(1, 40)):
        match rng.randrange(6):
            case 0:
                pieces.append(name(*rng.choice(NAMES).split()))
            case 1:
                pieces.append(text(rng.choice(("storage", "0", "cpu", "latin1", "state_dict", "a"))))
            case 2:
                pieces.append(b"K" + bytes([rng.randrange(8)]))
            case 3:
                pieces.append(rng.choice((b"q", b"h")) + bytes([rng.randrange(4)]))
            case 4:
                pieces.append(tensor())
            case 5:
                pieces.append(
                    bytes([rng.choice(b"NR()tQ}]eusbd01a\x81\x85\x86\x87\x88\x8f\x90\x91\x93\x94l")])
                )
    return b"".join(pieces) + b"."


def hostile_file(rng: random.Random) -> bytes:
    match rng.randrange(6):
        case 0 | 1:
            return mutated(rng, rng.choice(GOOD_FILES))
        case 2:
            return zipped(mutated(rng, GOOD_PICKLE))
        case 3:
            return legacy(mutated(rng, GOOD_PICKLE))
        case 4:
            return zipped(program(rng))
        case _:
            return safetensors(mutated(rng, GOOD_HEADER, TOKENS), FLOATS)


def attack(path: Path, content: bytes) -> bool:
    """Read one file; True if it loaded. Any exception but CheckpointError passes through."""
    path.write_bytes(content)
    start = time.process_time()
    loaded, message = {}, ""
    try:
        loaded = formats.read(path).tensors
    except CheckpointError as error:
        message = str(error)
    for found in loaded.values():
        found.clone()  # touches every element
    assert message.isprintable()
    assert len(message) <= 200
    assert time.process_time() - start < SECONDS
    return bool(loaded)


def run(folder: Path, seed: int, files: int | None = None, seconds: float = 0.0) -> int:
    """Attack with `files` files, or for `seconds`. Returns how many were tried."""
    rng, count, start = random.Random(seed), 0, time.monotonic()
    while count < files if files is not None else time.monotonic() - start < seconds:
        content = hostile_file(rng)
        try:
            attack(folder / "fuzz.bin", content)
        except BaseException:
            Path("fuzz-finding.bin").write_bytes(content)
            raise
        count += 1
    return count


def run_readers(folder: Path, seed: int, seconds: float) -> int:
    """Give wrong weights to every reader. Returns how many files were tried."""
    rng, count, start = random.Random(seed), 0, time.monotonic()
    while time.monotonic() - start < seconds:
        weights, read = rng.choice(list(readers().values()))
        path = save(folder / "fuzz.safetensors", altered(rng, weights))
        try:
            read(path)
        except LdmError as error:
            assert str(error).isprintable()  # noqa: PT017
            assert len(str(error)) <= 200  # noqa: PT017
        except BaseException:
            path.replace("fuzz-finding.safetensors")
            raise
        count += 1
    return count


def main() -> None:
    seconds = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    print(f"seed {seed}")
    logging.disable(logging.WARNING)  # of weights that a reader leaves out
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        files = run(Path(folder), seed, seconds=seconds * 2 / 3)
        print(f"{files} damaged files, no finding")
        print(f"{run_readers(Path(folder), seed, seconds / 3)} files of wrong weights, no finding")


if __name__ == "__main__":
    main()
