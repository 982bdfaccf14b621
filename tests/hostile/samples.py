"""Every hostile, damaged or mistaken weight file of the tests, by name.

`python -m tests.hostile.samples FOLDER` writes them all for a look with other tools, and refusals.txt anew.
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
import zipfile
import zlib
from pathlib import Path

from ldm import formats
from ldm.errors import CheckpointError
from tests.hostile.build import (
    FLOATS,
    PROTO2,
    legacy,
    name,
    patched,
    safetensors,
    state_dict,
    storage,
    tensor,
    text,
    zipped,
)
from tests.hostile.pickles import bombs, calls, routes, tensors

REFUSALS = Path(__file__).with_name(
    "refusals.txt"
)  # why each file is refused, so that no check hides another


def zips(good: bytes) -> dict[str, bytes]:
    """Archives that two readers could take for different things, or that cost more than they should."""
    plain = zipped(good)
    end = len(plain) - 22
    directory = struct.unpack_from("<L", plain, end + 16)[0]
    second = plain.index(b"PK\1\2", directory + 4)
    data = plain.index(FLOATS)
    return {
        "pickle_in_front": legacy(good) + plain,
        "junk_in_front": b"junk" + plain,
        "zip_in_front": plain + plain,
        "junk_after": plain + b"junk",
        "two_ends": patched(plain, end + 20, b"\x16\x00") + plain[end:],
        "comment_too_long": patched(plain, end + 20, b"\x05\x00"),
        "count_less": patched(plain, end + 8, b"\x01\x00\x01\x00"),
        "count_more": patched(plain, end + 8, b"\x03\x00\x03\x00"),
        "count_differs": patched(plain, end + 8, b"\x01\x00"),
        "disks": patched(plain, end + 4, b"\x01\x00"),
        "directory_moved": patched(plain, end + 16, struct.pack("<L", directory + 1)),
        "directory_huge": patched(plain, end + 12, b"\xff\xff\xff\x7f"),
        "directory_saturated": patched(plain, end + 12, b"\xff" * 8),
        "entry_signature": patched(plain, directory, b"PK\1\3"),
        "entry_name_long": patched(plain, directory + 28, b"\xff\x00"),
        "entry_name_other": patched(plain, directory + 46, b"b"),
        "entry_name_not_utf8": plain.replace(b"a/data.pkl", b"\xff/data.pkl"),
        "entry_extra_long": patched(plain, directory + 30, b"\xff\xff"),
        "entry_size_saturated": patched(plain, directory + 24, b"\xff" * 4),
        "entry_header_huge": patched(plain, second + 42, b"\xff\xff\xff\x7f"),
        "entry_overlaps": resized(plain, directory, 60),
        "entry_overlaps_directory": resized(plain, second, 40),
        "entry_over_file": resized(plain, second, 1 << 30),
        "entry_size_not_packed": patched(patched(plain, 22, b"\x01\0\0\0"), directory + 24, b"\x01\0\0\0"),
        "entry_cut": cut_entry(good),
        "entry_first_moved": patched(plain, directory + 42, plain[second + 42 : second + 46]),
        "overlap": patched(plain, second + 42, b"\0\0\0\0"),
        "local_signature": patched(plain, struct.unpack_from("<L", plain, second + 42)[0], b"PK\3\5"),
        "local_method": patched(plain, 8, b"\x08"),
        "local_crc": patched(plain, 14, b"\0\0\0\0"),
        "local_size": patched(plain, 22, b"\x01"),
        "encrypted": patched(patched(plain, 6, b"\x01"), directory + 8, b"\x01"),
        "method_bzip2": patched(patched(plain, 8, b"\x0c"), directory + 10, b"\x0c"),
        "stored_flip": patched(plain, data, bytes([plain[data] ^ 1])),
        "no_pickle": zipped(good, folder="a/x"),
        "empty": b"PK\5\6" + bytes(18),
        "nested": zipped(good, folder="a/").replace(b"data.pkl", b"data.zip"),
        "big_endian": zipped(good, {"data/0": FLOATS, "byteorder": b"big"}),
        "byteorder_long": zipped(good, {"data/0": FLOATS, "byteorder": b"little" * 1000}),
        "two_pickles": zipped(good, {"data/0": FLOATS, "b/data.pkl": good}),
        "two_names": zipped(good, {"data/0": FLOATS, "DATA/0": FLOATS}),
        "two_pickle_cases": zipped(good, {"data/0": FLOATS, "Data.pkl": good}),
        "pickle_bomb": zipped(bytes(20_000_000), method=zipfile.ZIP_DEFLATED),
        "storage_bomb": zipped(
            state_dict(tensor(storage(numel=1 << 24), shape=(1 << 24,))), {"data/0": bytes(1 << 26)}, 8
        ),
        "unpacks_longer": longer_than_declared(good),
        "deflated_flip": flipped_deflated(good),
        "deflated_truncated": truncated_deflated(good),
    }


def resized(archive: bytes, entry: int, more: int) -> bytes:
    """The archive with a member said to be `more` bytes longer, in the directory and in its local header."""
    local = struct.unpack_from("<L", archive, entry + 42)[0]
    sizes = struct.pack("<2L", *[struct.unpack_from("<L", archive, entry + 20)[0] + more] * 2)
    return patched(patched(archive, entry + 20, sizes), local + 18, sizes)


def cut_entry(good: bytes) -> bytes:
    """A directory said to have one entry more, which does not fit into its bytes."""
    archive = zipped(good, folder="a" * 90 + "/")
    return patched(archive, len(archive) - 14, b"\x03\x00\x03\x00")


def longer_than_declared(good: bytes) -> bytes:
    """A deflated data.pkl that holds more than the directory says."""
    whole = zipped(good + bytes(1000), method=zipfile.ZIP_DEFLATED)
    directory = whole.index(b"PK\1\2")
    short, crc = struct.pack("<L", len(good)), struct.pack("<L", zlib.crc32(good))
    whole = patched(patched(whole, 14, crc), 22, short)
    return patched(patched(whole, directory + 16, crc), directory + 24, short)


def flipped_deflated(good: bytes) -> bytes:
    whole = zipped(good, method=zipfile.ZIP_DEFLATED)
    return patched(whole, 60, bytes([whole[60] ^ 0x55]))


def truncated_deflated(good: bytes) -> bytes:
    """A deflated data.pkl whose stream ends before it is complete, in an archive that is sound otherwise."""
    packed = zlib.compress(good, 9)[2:-4]
    whole = zipped(packed[:-3])
    directory = whole.index(b"PK\1\2")
    for start in (8, directory + 10):
        whole = patched(whole, start, b"\x08\x00")
    for start in (14, directory + 16):
        whole = patched(whole, start, struct.pack("<L", zlib.crc32(good)))
    for start in (22, directory + 24):
        whole = patched(whole, start, struct.pack("<L", len(good)))
    return whole


def headers() -> dict[str, bytes]:
    """safetensors files that break a rule of the format."""

    def one(**changes: object) -> dict:
        return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}

    good, two = one(), b'{"a":%s,"a":%s}'
    entry = json.dumps(good["a"]).encode()
    raw = json.dumps(good).encode()
    half = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    other = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    cases: dict[str, object] = {
        "no_tensor": ({}, b""),
        "no_tensor_metadata": ({"__metadata__": {"a": "b"}}, b""),
        "bytes_after": (good, FLOATS + b"\0"),
        "bytes_missing": (good, FLOATS[:-1]),
        "hole": ({"a": half, "b": other | {"data_offsets": [9, 17]}}, FLOATS + b"\0"),
        "hole_first": (one(data_offsets=[1, 17]), FLOATS + b"\0"),
        "overlap": ({"a": half, "b": half | {"data_offsets": [4, 12]}}, FLOATS[:12]),
        "same_bytes": ({"a": half, "b": half}, FLOATS[:8]),
        "empty_inside": (
            {"a": good["a"], "b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}},
            FLOATS,
        ),
        "offsets_reversed": (one(data_offsets=[16, 0]), FLOATS),
        "offsets_three": (one(data_offsets=[0, 8, 16]), FLOATS),
        "offsets_float": (one(data_offsets=[0, 16.0]), FLOATS),
        "offsets_bool": (one(shape=[0], data_offsets=[False, False]), b""),
        "offsets_huge": (one(shape=[1 << 62], data_offsets=[0, 1 << 64]), FLOATS),
        "shape_overflow": (one(shape=[1 << 62, 4], data_offsets=[0, 0]), b""),
        "shape_overflow_zero": (one(shape=[0, 1 << 62, 1 << 62], data_offsets=[0, 0]), b""),
        "shape_negative": (one(shape=[-2, -2]), FLOATS),
        "shape_minus_0": (raw.replace(b"[0,", b"[-0,"), FLOATS),
        "shape_differs": (one(shape=[3]), FLOATS),
        "shape_text": (one(shape="4"), FLOATS),
        "shape_null": (one(shape=None), FLOATS),
        "shape_65": (one(shape=[1] * 64 + [4]), FLOATS),
        "dtype_unknown": (one(dtype="F31"), FLOATS),
        "dtype_lower": (one(dtype="f32"), FLOATS),
        "dtype_number": (one(dtype=32), FLOATS),
        "dtype_control": (one(dtype="\x1b[2J"), FLOATS),
        "dtype_half_bytes": (one(dtype="F4", shape=[32]), FLOATS),
        "no_shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, FLOATS),
        "twice": (two % (entry, entry), FLOATS),
        "twice_escaped": (b'{"a":%s,"\\u0061":%s}' % (entry, entry), FLOATS),
        "twice_inside": (raw.replace(b'"shape"', b'"shape": [4], "shape"'), FLOATS),
        "twice_metadata": (b'{"__metadata__":{"x":"1","x":"2"},' + raw[1:], FLOATS),
        "twice_metadata_object": (b'{"__metadata__":{},"__metadata__":{},' + raw[1:], FLOATS),
        "metadata_number": ({"__metadata__": {"a": 1}} | good, FLOATS),
        "metadata_null": ({"__metadata__": None} | good, FLOATS),
        "metadata_nested": ({"__metadata__": {"a": {"b": "c"}}} | good, FLOATS),
        "metadata_text": ({"__metadata__": "a"} | good, FLOATS),
        "metadata_huge": ({"__metadata__": {"a": "b" * 5_000_000}} | good, FLOATS),
        "metadata_many": ({"__metadata__": {f"a{i}": "b" * 3_900_000 for i in range(5)}} | good, FLOATS),
        "space_first": (b" " + raw, FLOATS),
        "bom_first": (b"\xef\xbb\xbf" + raw, FLOATS),
        "array": (b"[" + raw + b"]", FLOATS),
        "entry_array": (b'{"a":["F32",[4],[0,16]]}', FLOATS),
        "entry_null": (b'{"a":null}', FLOATS),
        "comma_last": (raw[:-1] + b",}", FLOATS),
        "comma_missing": (raw[:-1] + b' "b":' + entry + b"}", FLOATS),
        "colon_missing": (raw.replace(b'"a":', b'"a" '), FLOATS),
        "open": (raw[:-1], FLOATS),
        "more_after": (raw + b"{}", FLOATS),
        "nul_after": (raw + b"\0", FLOATS),
        "comment": (raw[:-1] + b"/**/}", FLOATS),
        "name_open": (b'{"a', FLOATS),
        "name_number": (b"{1:" + entry + b"}", FLOATS),
        "name_control": (raw.replace(b'"a"', b'"a\n"'), FLOATS),
        "name_escape": (raw.replace(b'"a"', b'"\\x"'), FLOATS),
        "name_surrogate": (raw.replace(b'"a"', b'"\\ud800"'), FLOATS),
        "name_not_utf8": (raw.replace(b'"a"', b'"\xff"'), FLOATS),
        "name_huge": ({"n" * 5000: good["a"]}, FLOATS),
        "single_quotes": (raw.replace(b'"', b"'"), FLOATS),
        "nested": (b'{"a":' + b"[" * 1_000_000, FLOATS),
        "nested_inside": (raw.replace(b"[4]", b"[" * 2000), FLOATS),
        "digits": (raw.replace(b"[4]", b"[" + b"4" * 4000 + b"]"), FLOATS),
        "spaces": (b"{" + b" " * 1_000_000 + raw[1:], FLOATS),
        "nan": (raw.replace(b"16", b"NaN"), FLOATS),
    }
    files = {key: safetensors(*case) for key, case in cases.items()}  # pyright: ignore[reportGeneralTypeIssues]
    whole = safetensors(good, FLOATS)
    return files | {
        "length_0": safetensors(b"", FLOATS),
        "length_1": safetensors(good, FLOATS, length=1),
        "length_over_file": safetensors(good, FLOATS, length=len(whole) - 7),
        "length_over_limit": safetensors(good, FLOATS, length=100_000_001),
        "length_2_63": safetensors(good, FLOATS, length=1 << 63),
        "too_many": safetensors(
            b"{"
            + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(60_000))
            + b"}"
        ),
    }


def mistakes() -> dict[str, bytes]:
    """What people give by accident."""
    return {
        "empty": b"",
        "one_byte": b"\x80",
        "zeros": bytes(4096),
        "html": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "html_late": b"\n\n  <HTML>",
        "json": b'{"error": "gated repository"}',
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "gguf": b"GGUF\x03" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "text": b"just a text\n" * 20,
        "tar": (b"storages" + bytes(249) + b"ustar").ljust(1024, b"\0"),
        "plain_pickle": pickle.dumps({"a": 1}),
        "plain_pickle_of_numbers": pickle.dumps([1, 2, 3], 2),
        "whole_object": zipped(PROTO2 + name("ldm.models", "Model") + b")\x81}b."),
        "one_tensor": zipped(PROTO2 + tensor() + b"."),
        "list_of_tensors": zipped(PROTO2 + b"]" + tensor() + b"a."),
        "no_tensor": zipped(PROTO2 + b"}."),
        "name_twice": zipped(
            PROTO2 + b"}(" + text("a.b") + tensor() + text("a") + b"}" + text("b") + tensor() + b"su."
        ),
    }


def legacy_files(good: bytes) -> dict[str, bytes]:
    whole = legacy(good)
    return {
        "bytes_after": whole + b"\0",
        "pickle_after": whole + good,
        "zip_after": whole + zipped(good),
        "protocol": whole.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)),
        "big_endian": legacy(good, machine={"little_endian": False}),
        "machine": legacy(good, machine=[]),
        "keys_missing": legacy(good, keys=()),
        "keys_other": legacy(good, keys=("1",)),
        "keys_twice": legacy(good, keys=("0", "0")),
        "keys_number": legacy(good, keys=0),
        "keys_nested": legacy(good, keys=([],)),
        "storage_missing": legacy(good, ()),
        "storage_short": legacy(good, (FLOATS[:8],)),
        "storage_long": legacy(good, (FLOATS * 2,)),
    }


def hostile_files(marker: Path) -> dict[str, bytes]:
    """Every file by name. None may load, none may run anything, each must be refused in one line."""
    good = state_dict(tensor())
    files = {f"header_{key}.safetensors": data for key, data in headers().items()}
    empty = files["header_no_tensor.safetensors"]
    for key, pickled in {**calls(marker), **routes()}.items():
        files[f"zip_{key}.ckpt"] = zipped(pickled)
        files[f"legacy_{key}.pt"] = legacy(pickled)
    for key, pickled in calls(marker).items():
        files[f"plain_{key}.pkl"] = pickled
        files[f"named_{key}.safetensors"] = pickled
        files[f"zip_named_{key}.safetensors"] = zipped(pickled)
        files[f"deflated_{key}.ckpt"] = zipped(pickled, method=zipfile.ZIP_DEFLATED)
        files[f"before_zip_{key}.ckpt"] = pickled + zipped(good)
        files[f"before_safetensors_{key}.safetensors"] = pickled + empty
        files[f"legacy_keys_{key}.pt"] = legacy(good)[: -len(pickle.dumps(["0"], 2)) - 24] + pickled
        files[f"legacy_machine_{key}.pt"] = legacy(good)[:40] + pickled
    for key, pickled in tensors().items():
        files[f"zip_tensor_{key}.ckpt"] = zipped(pickled)
        files[f"legacy_tensor_{key}.pt"] = legacy(pickled)
    files |= {f"zip_bomb_{key}.ckpt": zipped(pickled) for key, pickled in bombs().items()}
    files |= {f"zip_{key}.ckpt": data for key, data in zips(good).items()}
    files |= {f"legacy_{key}.pt": data for key, data in legacy_files(good).items()}
    files |= {f"mistake_{key}.ckpt": data for key, data in mistakes().items()}
    files |= {f"mistake_{key}.safetensors": data for key, data in mistakes().items()}
    return files


def refusals(folder: Path) -> dict[str, str]:
    """What is said of the small files in the folder that are archives or headers, without their names."""
    said = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(("zip_", "header_")) and path.stat().st_size < 100_000:
            try:
                formats.read(path)
            except CheckpointError as error:
                said[path.name] = str(error).removeprefix(f"{path.name}: ")
    return said


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in hostile_files(folder / "EXECUTED").items():
        (folder / file_name).write_bytes(content)
    REFUSALS.write_text("".join(f"{name}\t{why}\n" for name, why in refusals(folder).items()), "utf-8")
