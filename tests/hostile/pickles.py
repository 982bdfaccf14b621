"""Hostile pickles. A payload, if it ran, would create a marker file and do nothing else."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

from tests.hostile.build import PROTO2, PROTO4, name, state_dict, storage, tensor, text, value

# Of the standard library, of torch and numpy, and look-alikes of the roots whose classes become placeholders.
REFUSED_NAMES = """
os.system posix.system nt.system subprocess.Popen builtins.exec builtins.compile builtins.getattr
builtins.__import__ builtins.object torch.load torch.hub.load torch.save torch.jit.load torch.os.system
torch.ops.load_library torch.classes.load_library torch._utils._rebuild_qtensor
torch.storage._load_from_bytes torch._utils._rebuild_sparse_tensor torch._tensor._rebuild_from_type
torch.nn.modules.linear.Linear torch.fx.graph_module.reduce_graph_module torch.serialization.load
numpy.load numpy.testing._private.utils.runstring
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
