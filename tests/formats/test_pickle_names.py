"""The names that a pickle may use: that there are no others, what each gives and what it refuses."""

from __future__ import annotations

import struct
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

from ldm.errors import CheckpointError
from ldm.formats.pickle_names import (
    NAMES,
    Function,
    Opaque,
    OpaqueClass,
    StorageClass,
    StorageRef,
    TensorRef,
    call,
    find,
    is_key,
)

FLOATS = StorageRef("0", torch.float32, 4)


def test_the_names_are_these_and_no_others() -> None:
    kinds = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat Untyped"
    dtypes = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 complex64"
    newer = "uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    expected: dict[str, object] = {
        f"torch {dtype}": getattr(torch, dtype) for dtype in f"{dtypes} {newer}".split()
    }
    for kind, dtype in zip(kinds.split(), [*dtypes.split(), "uint8"], strict=True):
        for module in ("torch", "torch.storage"):
            expected[f"{module} {kind}Storage"] = StorageClass(getattr(torch, dtype))
    for full in OPAQUE_NAMES.split():
        expected[full.replace(":", " ")] = OpaqueClass(full.replace(":", "."))
    assert {
        " ".join(key): meaning for key, meaning in NAMES.items() if not isinstance(meaning, Function)
    } == expected
    functions = {" ".join(key) for key, meaning in NAMES.items() if isinstance(meaning, Function)}
    assert functions == {
        f"{module} {name}"
        for modules, names in FUNCTION_NAMES
        for module in modules.split()
        for name in names.split()
    }


OPAQUE_NAMES = """
torch:Tensor torch.nn.parameter:Parameter torch.nn.modules.container:ParameterDict typing:Any numpy:dtype
numpy:float64 numpy:float32 numpy:float16 numpy:int64 numpy:int32 numpy:int16 numpy:int8 numpy:bool_
builtins:dict builtins:list builtins:tuple builtins:str builtins:int builtins:long builtins:float
builtins:bool __builtin__:dict __builtin__:list __builtin__:tuple __builtin__:str __builtin__:int
__builtin__:long __builtin__:float __builtin__:bool
"""


def test_classes_below_these_roots_are_inert_and_all_else_is_refused() -> None:
    for root in ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "ldm", "taming", "sgm"):
        assert find(root, "A") == OpaqueClass(f"{root}.A")
        assert find(f"{root}.b.c", "A") == OpaqueClass(f"{root}.b.c.A")
        for module in (f"{root}x.b", f"x{root}", f"x.{root}", root.upper()):
            with pytest.raises(CheckpointError, match="which no weight file needs"):
                find(module, "A")
    with pytest.raises(CheckpointError, match=rf"names x\?\.{'a' * 44}\.\.\., which"):
        find("x\n", "a" * 500)


def function(module: str, attribute: str) -> Function:
    found = find(module, attribute)
    assert isinstance(found, Function)
    return found


TENSOR = TensorRef(FLOATS, torch.float32, 0, (4,), (1,))
BYTES = StorageRef("1", torch.uint8, 16)
DTYPE = Opaque("numpy.dtype", ("f4", False, True), (3, "<", None))
PAIRS = [["a", 1], (b"b", 2), [OpaqueClass("x"), 3]]
V2 = function("torch._utils", "_rebuild_tensor_v2")
V3 = function("torch._utils", "_rebuild_tensor_v3")
PARAMETER = function("torch._utils", "_rebuild_parameter")

# Modules, names, and for each list of arguments the result.
FUNCTION_CASES: list[tuple[str, str, list[tuple[tuple, Any]]]] = [
    (
        "torch._utils",
        "_rebuild_tensor _rebuild_tensor_v2",
        [
            ((FLOATS, 0, (4,), (1,)), TENSOR),
            ((FLOATS, 1, (), (), False, {}), TensorRef(FLOATS, torch.float32, 1, (), ())),
            ((FLOATS, 0, (4,), (1,), False, {}, {}), TENSOR),
            ((FLOATS, 0, (4,), (1,), False, {}, None), TENSOR),
            (
                (FLOATS, 0, (4,), (1,), False, {}, {"conj": True}),
                TensorRef(FLOATS, torch.float32, 0, (4,), (1,), True),
            ),
            (
                (FLOATS, 0, (4,), (1,), False, {}, {"neg": True}),
                TensorRef(FLOATS, torch.float32, 0, (4,), (1,), False, True),
            ),
            ((FLOATS, 0, (4,), (1,), False, {}, {"neg": 1, "conj": 1}), TENSOR),
        ],
    ),
    (
        "torch._utils",
        "_rebuild_tensor_v3",
        [
            (
                (BYTES, 1, (3,), (1,), False, {}, torch.float32),
                TensorRef(BYTES, torch.float32, 1, (3,), (1,)),
            ),
            (
                (BYTES, 0, (2,), (1,), False, {}, torch.complex64, {"conj": True, "neg": True}),
                TensorRef(BYTES, torch.complex64, 0, (2,), (1,), True, True),
            ),
        ],
    ),
    (
        "torch._utils",
        "_rebuild_parameter _rebuild_parameter_with_state",
        [((TENSOR, True, {}), TENSOR), ((TENSOR,), TENSOR)],
    ),
    (
        "torch._tensor",
        "_rebuild_from_type_v2",
        [
            ((V2, None, (FLOATS, 0, (4,), (1,)), {"a": 1}), TENSOR),
            (
                (V3, None, (BYTES, 0, (4,), (1,), False, {}, torch.float32)),
                TensorRef(BYTES, torch.float32, 0, (4,), (1,)),
            ),
            ((PARAMETER, None, (TENSOR,), None), TENSOR),
        ],
    ),
    (
        "collections",
        "OrderedDict Counter defaultdict",
        [
            ((), {}),
            ((OpaqueClass("builtins.list"),), {}),
            (({"a": 1},), {"a": 1}),
            ((PAIRS,), {"a": 1, b"b": 2}),
        ],
    ),
    ("torch", "Size", [((), []), (([1],), [1]), (((1,),), (1,))]),
    ("builtins __builtin__", "set frozenset", [((), []), (([1],), [1]), (((1,),), (1,))]),
    ("_codecs", "encode", [(("a\xff", "latin1"), b"a\xff"), (("a", "latin-1"), b"a"), (("", "latin1"), b"")]),
    (
        "builtins __builtin__",
        "bytes bytearray",
        [((), b""), ((b"a",), b"a"), (("a\xff", "latin-1"), b"a\xff")],
    ),
    ("builtins __builtin__", "complex", [((1.0, -2.0), 1 - 2j)]),
    ("torch", "device", [(("cpu",), "cpu"), (("cuda", 1), "cuda:1")]),
    (
        "numpy.core.multiarray numpy._core.multiarray",
        "scalar",
        [
            ((DTYPE, struct.pack("<f", 0.5)), 0.5),
            ((Opaque("numpy.dtype", ("b1",), (3, "|")), b"\1"), True),
            *(
                ((Opaque("numpy.dtype", (code,), (3, "<", None)), struct.pack("<" + letter, number)), number)
                for code, letter, number in (
                    ("f8", "d", -3.5),
                    ("f2", "e", -3.5),
                    ("i8", "q", -3),
                    ("i4", "i", -3),
                    ("i2", "h", -3),
                    ("i1", "b", -3),
                )
            ),
        ],
    ),
]
FUNCTION_NAMES = [(modules, names) for modules, names, _ in FUNCTION_CASES]


@pytest.mark.parametrize(("modules", "names", "cases"), FUNCTION_CASES, ids=[n for _, n, _ in FUNCTION_CASES])
def test_every_function_is_retold(modules: str, names: str, cases: list[tuple[tuple, Any]]) -> None:
    for module in modules.split():
        for attribute in names.split():
            assert function(module, attribute).name == attribute
            for args, expected in cases:
                found = call(function(module, attribute), args)
                assert type(found) is type(expected)
                assert found == expected


@pytest.mark.parametrize(
    ("module", "attribute", "args"),
    [
        ("torch._utils", "_rebuild_tensor_v2", ()),
        ("torch._utils", "_rebuild_tensor_v2", (None, 0, (4,), (1,))),
        ("torch._utils", "_rebuild_tensor_v2", (FLOATS, 0.0, (4,), (1,))),
        ("torch._utils", "_rebuild_tensor_v2", (FLOATS, 0, [4], (1,))),
        ("torch._utils", "_rebuild_tensor_v2", (FLOATS, 0, (4,), [1])),
        ("torch._utils", "_rebuild_tensor_v2", (FLOATS, 0, (True,), (1,))),
        ("torch._utils", "_rebuild_tensor_v2", (FLOATS, 0, (4,), (-1,))),
        ("torch._utils", "_rebuild_tensor_v2", (FLOATS, 0, (1,) * 65, (1,) * 65)),
        (
            "torch._utils",
            "_rebuild_tensor_v2",
            (StorageRef("1", torch.int32, 4), 0, (4,), (1,), 0, 0, {"neg": True}),
        ),
        ("torch._utils", "_rebuild_tensor_v2", (FLOATS, 0, (4,), (1,), 0, 0, 0, 0, 0)),
        ("torch._utils", "_rebuild_tensor_v3", (FLOATS, 0, (4,), (1,), False, {})),
        ("torch._utils", "_rebuild_tensor_v3", (FLOATS, 0, (4,), (1,), False, {}, "float32")),
        ("torch._utils", "_rebuild_parameter", ()),
        ("torch._utils", "_rebuild_parameter", (FLOATS,)),
        ("torch._tensor", "_rebuild_from_type_v2", (V2, None)),
        ("torch._tensor", "_rebuild_from_type_v2", (V2, None, [FLOATS, 0, (4,), (1,)])),
        ("torch._tensor", "_rebuild_from_type_v2", (find("torch", "Size"), None, ())),
        ("torch._tensor", "_rebuild_from_type_v2", (V2, None, (FLOATS, 0, (4,), (1,), 0, 0, 0, 0, 0))),
        ("collections", "OrderedDict", (1,)),
        ("collections", "OrderedDict", ([], [])),
        ("collections", "OrderedDict", ([["a"]],)),
        ("collections", "OrderedDict", (["ab"],)),
        ("torch", "Size", ("ab",)),
        ("torch", "Size", ([], [])),
        ("_codecs", "encode", ("\u0100", "latin1")),
        ("_codecs", "encode", ("a", "utf-8")),
        ("_codecs", "encode", (4,)),
        ("builtins", "complex", (1, 2)),
        ("builtins", "complex", ("1",)),
        ("torch", "device", ()),
        ("torch", "device", ("cuda", "1")),
        ("torch", "device", (1,)),
    ],
)
def test_a_misused_function_is_refused(module: str, attribute: str, args: tuple) -> None:
    with pytest.raises(CheckpointError, match="in a way that no weight file does"):
        call(function(module, attribute), args)


@pytest.mark.parametrize(
    "args",
    [
        (),
        (DTYPE, b"123"),
        (DTYPE, "1234"),
        (Opaque("numpy.dtyp", ("f4",), (3, "<")), b"1234"),
        (Opaque("numpy.dtype", ("c8",), (3, "<")), bytes(8)),
        (Opaque("numpy.dtype", ("f4",), (3, ">")), b"1234"),
        (Opaque("numpy.dtype", (), (3, "<")), b"1234"),
        (Opaque("numpy.dtype", ("f4",), None), b"1234"),
    ],
    ids=repr,
)
def test_other_scalars_of_numpy_are_inert(args: tuple) -> None:
    scalar = call(function("numpy.core.multiarray", "scalar"), args)
    assert isinstance(scalar, Opaque)
    assert (scalar.name, scalar.args, scalar.state) == ("numpy scalar", (), None)


def made(offset: int, shape: tuple, stride: tuple) -> TensorRef:
    return call(V2, (FLOATS, offset, shape, stride))


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (3, (1,), (1,)),
        (3, (), ()),
        (0, (2, 2), (2, 1)),
        (1, (2, 2), (1, 1)),
        (0, (1,), (1 << 62,)),
        (9, (0,), (1,)),
        (9, (0, 1 << 62), (1, 1)),
        (0, (250_000,), (0,)),
        (0, (500, 500), (0, 0)),
        (0, (1,) * 64, (1,) * 64),
    ],
)
def test_a_tensor_inside_its_storage_is_accepted(offset: int, shape: tuple, stride: tuple) -> None:
    assert made(offset, shape, stride) == TensorRef(FLOATS, torch.float32, offset, shape, stride)


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "why"),
    [
        (4, (1,), (1,), "element 4 of 4"),
        (4, (), (), "element 4 of 4"),
        (0, (5,), (1,), "element 4 of 4"),
        (1, (2, 2), (2, 1), "element 4 of 4"),
        (-1, (1,), (1,), "impossible"),
        (-1, (0,), (1,), "impossible"),
        (0, (4,), (1, 1), "impossible"),
        (0, (4,), (), "impossible"),
        (0, (0, 1 << 63), (1, 1), "impossible"),
        (0, (0, 1 << 62, 2), (1, 1, 1), "impossible"),
        (0, (250_001,), (0,), "repeats 4 numbers to 250001"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(offset: int, shape: tuple, stride: tuple, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        made(offset, shape, stride)


def test_a_number_is_repeated_to_at_most_a_million_bytes() -> None:
    one = StorageRef("0", torch.uint8, 1)
    assert call(V2, (one, 0, (1_000_000,), (0,))).shape == (1_000_000,)
    with pytest.raises(CheckpointError, match="repeats 1 numbers to 1000001"):
        call(V2, (one, 0, (1_000_001,), (0,)))


def test_bytes_that_are_no_whole_number_are_no_element() -> None:
    args = (StorageRef("0", torch.uint8, 7), 0, (1,), (1,), False, {}, torch.float32)
    assert call(V3, args).shape == (1,)
    with pytest.raises(CheckpointError, match="element 1 of 1"):
        call(V3, (args[0], 1, *args[2:]))


def test_keys_are_texts_and_small_numbers() -> None:
    keys = ["a", b"a", True, None, 0, 2**31 - 1, 1 - 2**31]
    others = [2**31, -(2**31), 1.5, (), ("a",), torch.float32, Opaque("a"), FLOATS]
    assert [is_key(key) for key in keys] == [True] * len(keys)
    assert [is_key(key) for key in others] == [False] * len(others)


def test_records_are_small_and_fixed() -> None:
    records = (FLOATS, TENSOR, OpaqueClass("a"), StorageClass(torch.float32), V2)
    for record in records:
        assert not hasattr(record, "__dict__")
        with pytest.raises(FrozenInstanceError):
            setattr(record, fields(record)[0].name, None)
    assert not hasattr(Opaque("a"), "__dict__")
    assert Opaque("a") != Opaque("a")
    assert hash(Opaque("a"))
