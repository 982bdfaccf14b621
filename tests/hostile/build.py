"""Hostile and damaged weight files, built byte by byte. A payload, if it ran, would create a marker file.

`python -m tests.hostile.build FOLDER` writes them all for a look with other tools.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

PROTO2, PROTO4, STOP = b"\x80\x02", b"\x80\x04", b"."
FLOATS = struct.pack("<4f", 1, 2, 3, 4)


# --- pieces of a pickle


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


# --- containers


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


# --- payloads

# Of the standard library, of torch and numpy, and look-alikes of the roots whose classes become placeholders.
REFUSED_NAMES = """
os.system posix.system nt.system subprocess.Popen builtins.exec builtins.compile builtins.getattr
builtins.__import__ builtins.object torch.load torch.hub.load torch.save torch.jit.load torch.os.system
torch.ops.load_library torch.classes.load_library torch._utils._rebuild_qtensor
torch.storage._load_from_bytes torch._utils._rebuild_sparse_tensor torch._tensor._rebuild_from_type
torch.nn.modules.linear.Linear numpy.load numpy.testing._private.utils.runstring
numpy.f2py.crackfortran.getlincoef collections.deque operator.attrgetter functools.partial pickle.loads
_pickle.loads cloudpickle.loads runpy._run_code pydoc.pipepager pip.main pkgutil.resolve_name
importlib.import_module webbrowser.open shutil.rmtree asyncio.run socket.create_connection
urllib.request.urlopen codecs.encode _codecs.decode ctypes.CDLL ldmx.Y ldm_evil.Y Ldm.Y sgmm.Y
lightning2.Y xlightning.Y pytorch_lightning_.Y taming2.Y omegaconfig.Y
"""


def calls(marker: Path) -> dict[str, bytes]:
    """Pickles that, read by Python's own machine, create `marker`."""
    path = str(marker)
    touch = f"touch {path}"
    run = name("os", "system")
    opened = text(path) + text("w")
    evaluated = text(f"open({path!r}, 'w')")
    return {
        "reduce": PROTO2 + run + text(touch) + b"\x85R.",
        "stack_global": PROTO4 + text("os") + text("system") + b"\x93" + text(touch) + b"\x85R.",
        "dotted": PROTO4 + text("torch") + text("os.system") + b"\x93" + text(touch) + b"\x85R.",
        "open": PROTO2 + name("builtins", "open") + opened + b"\x86R.",
        "python2": PROTO2 + name("__builtin__", "open") + opened + b"\x86R.",
        "eval": PROTO2 + name("builtins", "eval") + evaluated + b"\x85R.",
        "getattr": PROTO2
        + name("builtins", "getattr")
        + (name("builtins", "__import__") + text("os") + b"\x85R" + text("system") + b"\x86R")
        + (text(touch) + b"\x85R."),
        "inst": b"(" + text(path) + text("w") + b"ibuiltins\nopen\n.",
        "obj": b"(" + name("builtins", "open") + opened + b"o.",
        "setstate": PROTO2
        + (name("types", "SimpleNamespace") + b")R}" + text("__setstate__") + run + b"sb")
        + (text(touch) + b"b."),
        "partial": PROTO2 + name("functools", "partial") + run + text(touch) + b"\x86R)R.",
        "map": PROTO2
        + (name("builtins", "list") + name("builtins", "map") + run + b"](" + text(touch) + b"e\x86R")
        + b"\x85R.",
        "load_from_bytes": PROTO2
        + (name("torch.storage", "_load_from_bytes") + b"B")
        + (lambda inner: struct.pack("<I", len(inner)) + inner)(pickle.dumps(_Touch(path)))
        + b"\x85R.",
        "hidden_in_state_dict": PROTO2 + b"}(" + text("t") + run + text(touch) + b"\x85Ru.",
        "hidden_in_popped": PROTO2 + run + text(touch) + b"\x85R0}.",
        "hidden_in_memo": PROTO2 + run + b"q\x000h\x00" + text(touch) + b"\x85R.",
        "hidden_in_opaque": PROTO2 + name("ldm.x", "Y") + run + text(touch) + b"\x85R\x85R.",
    }


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (self.path, "w")


def routes() -> dict[str, bytes]:
    """Pickles that reach for code in ways that a reader must not know, refused before any effect."""
    numpy_array = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray")
    whole = {
        "ext1": PROTO2 + b"\x82\x01)R.",
        "ext2": PROTO2 + b"\x83\x01\x00)R.",
        "ext4": PROTO2 + b"\x84\x01\x00\x00\x00)R.",
        "persid": b"Pos.system\n.",
        "persistent_code": PROTO2 + b"(" + text("module") + name("ldm", "X") + text("a") + text("b") + b"tQ.",
        "newobj": PROTO2 + name("subprocess", "Popen") + text("true") + b"\x85\x81.",
        "newobj_ex": PROTO4 + name("subprocess", "Popen") + b")}\x92.",
        "call_text": PROTO2 + text("os.system") + text("true") + b"\x85R.",
        "call_tensor": PROTO2 + tensor() + b")R.",
        "call_dtype": PROTO2 + name("torch", "float32") + b")R.",
        "call_storage": PROTO2 + name("torch", "FloatStorage") + b"K\x01\x85R.",
        "args_not_tuple": PROTO2 + name("collections", "OrderedDict") + b"]R.",
        "name_not_text": PROTO4 + b"K\x01K\x02\x93.",
        "build_tensor": PROTO2 + tensor() + text("_backward_hooks") + b"b.",
        "append_to_tensor": PROTO2 + tensor() + b"K\x01a.",
        "append_to_dict": PROTO2 + b"}K\x01a.",
        "setitem_on_list": PROTO2 + b"]" + text("a") + b"Ns.",
        "setitem_on_tensor": PROTO2 + tensor() + b"K\x00K\x01s.",
        "setitems_odd": PROTO2 + b"}(K\x01u.",
        "buffer": b"\x80\x05\x97.",
        "dup": PROTO2 + b"N2.",
        "long4": PROTO2 + b"\x8b\xff\xff\xff\x7f.",
        "encode_rot13": PROTO2 + name("_codecs", "encode") + text("a") + text("rot13") + b"\x86R.",
        "encode_wide": PROTO2 + name("_codecs", "encode") + text("\u4e00") + text("latin1") + b"\x86R.",
        "ordered_dict_of_number": PROTO2 + name("collections", "OrderedDict") + b"K\x01\x85R.",
        "size_of_text": PROTO2 + name("torch", "Size") + text("ab") + b"\x85R.",
        "complex_of_text": PROTO2 + name("builtins", "complex") + text("1") + b"\x85R.",
        "device_of_number": PROTO2 + name("torch", "device") + b"K\x01\x85R.",
        "bytearray_size": PROTO2 + name("builtins", "bytearray") + b"J\xff\xff\xff\x7f\x85R.",
        "numpy_array": PROTO2 + numpy_array + b"K\x00\x85R.",
        "unknown_dtype": PROTO2 + name("torch", "qint8") + b".",
        "protocol_9": b"\x80\x09}.",
        "get_unknown": PROTO2 + b"h\x07.",
        "not_utf8": PROTO2 + b"X\x01\x00\x00\x00\xff.",
        "int_text": PROTO2 + b"I0x10\n.",
        "int_long_text": PROTO2 + b"L" + b"9" * 60 + b"L\n.",
        "global_too_long": PROTO2 + b"c" + b"a" * 600 + b"\nb\n.",
        "global_control": PROTO2 + name("\x1b[31mred\x07", "b\u202e") + b".",
        "endless": PROTO2 + b"}",
        "empty_stack": PROTO2 + b".",
        "pop_empty": PROTO2 + b"0.",
        "tuple_empty": PROTO2 + b"\x87.",
        "items_unmarked": PROTO2 + b"]e.",
    }
    for full in REFUSED_NAMES.split():
        module, _, attribute = full.rpartition(".")
        whole[f"name_{full}"] = PROTO2 + name(module, attribute) + b")R."
    return whole


# --- the files


def tensors() -> dict[str, bytes]:
    """Pickles whose tensors do not fit their storage of four floats."""
    big = 1 << 62
    cases = {
        "offset": tensor(offset=1),
        "offset_negative": tensor(offset=-1, shape=(2,)),
        "offset_huge": tensor(offset=big),
        "offset_float": tensor(offset=0.5),
        "shape": tensor(shape=(5,)),
        "shape_negative": tensor(shape=(-4,)),
        "shape_negative_pair": tensor(shape=(-2, -2), stride=(2, 1)),
        "shape_huge": tensor(shape=(big,)),
        "shape_huge_stride_0": tensor(shape=(big,), stride=(0,)),
        "shape_overflow": tensor(shape=(big, 4), stride=(0, 0)),
        "shape_zero_overflow": tensor(shape=(0, big, 4), stride=(1, 1, 1)),
        "shape_list": tensor(shape=[4]),
        "shape_bool": tensor(shape=(True,)),
        "shape_text": tensor(shape=("4",)),
        "shape_longer": tensor(shape=(2, 2)),
        "shape_65": tensor(shape=(1,) * 65, stride=(1,) * 65),
        "stride": tensor(stride=(2,)),
        "stride_negative": tensor(offset=3, stride=(-1,)),
        "stride_huge": tensor(stride=(big,)),
        "stride_0": tensor(shape=(1 << 20,), stride=(0,)),
        "stride_pair": tensor(shape=(2, 2), stride=(2, 2)),
        "storage_longer": tensor(storage(numel=5)),
        "storage_shorter": tensor(storage(numel=3), shape=(3,)),
        "storage_negative": tensor(storage(numel=-4)),
        "storage_huge": tensor(storage(numel=big)),
        "storage_double": tensor(storage(kind="DoubleStorage")),
        "storage_missing": tensor(storage("1")),
        "storage_number": tensor(storage(0)),
        "storage_path": tensor(storage("../data.pkl")),
        "storage_unicode_digit": tensor(storage("\u0660")),
        "storage_two_kinds": tensor() + tensor(storage(kind="IntStorage")) + b"\x86",
        "storage_view": tensor(storage(extra=value(("1", 0, 2)))),
        "storage_unknown": tensor(storage(kind="QInt8Storage")),
        "storage_none": tensor(b"N"),
        "few_args": name("torch._utils", "_rebuild_tensor_v2") + b")R",
        "many_args": name("torch._utils", "_rebuild_tensor_v2") + b"(" + b"N" * 50 + b"tR",
        "v3_no_dtype": tensor(function="_rebuild_tensor_v3"),
        "parameter_of_text": name("torch._utils", "_rebuild_parameter") + text("a") + b"\x85R",
        "subclass_of_name": name("torch._tensor", "_rebuild_from_type_v2")
        + (b"(" + name("collections", "OrderedDict") + b"N)}tR"),
        "negative_integers": name("torch._utils", "_rebuild_tensor_v2")
        + (b"(" + storage(kind="IntStorage") + value(0) + value((4,)) + value((1,)) + b"\x89N")
        + (value({"neg": True}) + b"tR"),
    }
    return {key: state_dict(case) for key, case in cases.items()}


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


def bombs() -> dict[str, bytes]:
    """Pickles that are valid and small, and that would take much time or memory."""
    key = b"\x8a\x0c"
    return {
        "dicts": PROTO2 + b"}" * 2_000_000 + b".",
        "deep": PROTO2 + b"]" * 300_000 + b"a" * 299_999 + b".",
        "deep_tuples": PROTO2 + b")" + b"\x85" * 300_000 + b".",
        "deep_dict": PROTO2 + b"}" + (text("state_dict") + b"}") * 200 + b"s" * 200 + b".",
        "cycle": PROTO2 + b"}q\x00" + text("a") + b"h\x00s.",
        "laughs": PROTO2
        + b"}q\x00"
        + b"".join(b"}(" + text("a") + b"h%c" % i + text("b") + b"h%cuq%c" % (i, i + 1) for i in range(40))
        + b".",
        "laughs_lists": PROTO2
        + b"]q\x00"
        + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))
        + b".",
        "memo": PROTO2 + b"N" + b"".join(b"r" + struct.pack("<I", 97 * i) for i in range(700_000)) + b".",
        "hashes": PROTO2
        + (
            b"}("
            + b"".join(key + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(60_000))
            + b"u."
        ),
        "set_hashes": PROTO4
        + (
            b"\x8f("
            + b"".join(key + (i * (2**61 - 1)).to_bytes(12, "little") for i in range(60_000))
            + b"\x90."
        ),
        "long_names": PROTO4
        + (
            text("ldm." + "a" * 3_000_000)
            + b"\x94"
            + text("Y")
            + b"\x94"
            + b"h\x00h\x01\x93" * 100_000
            + b"."
        ),
        "long_keys": PROTO2 + b"}" + text("a" * 2000) + tensor() + b"s.",
        "text": PROTO2 + b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
        "text_long": PROTO2 + text("a" * 5_000_000) + b".",
        "encode_again": PROTO2
        + (name("_codecs", "encode") + b"q\x00" + text("a" * 3_000_000) + text("latin1") + b"\x86q\x01")
        + (b"h\x00h\x01R" * 1000 + b"."),
        "items_again": PROTO2
        + (
            name("collections", "OrderedDict")
            + b"q\x00]("
            + b"".join(text("a") + b"N\x86" for _ in range(20_000))
        )
        + (b"e\x85q\x01" + b"h\x00h\x01R" * 1000 + b"."),
        "shapes_again": PROTO2
        + (
            name("torch._utils", "_rebuild_tensor_v2")
            + b"q\x20("
            + storage()
            + b"K\x00("
            + b"K\x01" * 200_000
        )
        + (b"t)\x89Ntq\x21" + b"h\x20h\x21R" * 1000 + b"."),
        "subclass_again": PROTO2
        + (name("torch._tensor", "_rebuild_from_type_v2") + b"q\x00N" + b"q\x01")
        + b"".join(b"(h\x00Nh\x01Ntq\x01" for _ in range(3000))
        + b"h\x00h\x01R.",
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
    files: dict[str, bytes] = {}
    for key, pickled in {**calls(marker), **routes()}.items():
        files[f"zip_{key}.ckpt"] = zipped(pickled)
        files[f"legacy_{key}.pt"] = legacy(pickled)
    for key, pickled in calls(marker).items():
        files[f"plain_{key}.pkl"] = pickled
        files[f"named_{key}.safetensors"] = pickled
        files[f"zip_named_{key}.safetensors"] = zipped(pickled)
        files[f"deflated_{key}.ckpt"] = zipped(pickled, method=zipfile.ZIP_DEFLATED)
        files[f"before_zip_{key}.ckpt"] = pickled + zipped(good)
        files[f"before_safetensors_{key}.safetensors"] = pickled + headers()["no_tensor"]
        files[f"legacy_keys_{key}.pt"] = legacy(good)[: -len(pickle.dumps(["0"], 2)) - 24] + pickled
        files[f"legacy_machine_{key}.pt"] = legacy(good)[:40] + pickled
    for key, pickled in tensors().items():
        files[f"zip_tensor_{key}.ckpt"] = zipped(pickled)
        files[f"legacy_tensor_{key}.pt"] = legacy(pickled)
    files |= {f"zip_bomb_{key}.ckpt": zipped(pickled) for key, pickled in bombs().items()}
    files |= {f"zip_{key}.ckpt": data for key, data in zips(good).items()}
    files |= {f"header_{key}.safetensors": data for key, data in headers().items()}
    files |= {f"legacy_{key}.pt": data for key, data in legacy_files(good).items()}
    files |= {f"mistake_{key}.ckpt": data for key, data in mistakes().items()}
    files |= {f"mistake_{key}.safetensors": data for key, data in mistakes().items()}
    return files


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in hostile_files(folder / "EXECUTED").items():
        (folder / file_name).write_bytes(content)
