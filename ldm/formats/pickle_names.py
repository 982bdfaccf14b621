"""What the names in a pickled checkpoint mean: inert records, a few functions re-told here, and nothing else.

torch.save writes "call torch._utils._rebuild_tensor_v2 with these arguments". Nothing of that name is ever
called: `find` maps an exact (module, name) pair to a function of this file, which checks its arguments and
returns a record. Classes of the frameworks that wrote the old checkpoints become `Opaque`. Every other name
is refused.

What torch.save writes: torch/_utils.py and torch/_tensor.py in
https://github.com/pytorch/pytorch/tree/v2.10.0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ldm.errors import CheckpointError
from ldm.formats.mapped import printable

PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
MAX_ARGS = 8  # of a function below; the longest list of arguments that torch writes
MAX_DIMENSIONS = 64  # torch's own limit
MAX_REPEATED = 1_000_000  # bytes that a tensor may hold beyond its storage (one number expanded to a shape)
MAX_KEY = 1 << 31  # integers as dict keys: below that, their hashes cannot be made to collide


@dataclass(frozen=True, slots=True)
class StorageRef:
    """The bytes that the container keeps under `key`: `numel` elements of `dtype`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view of a storage, which lies inside it: `checked` has seen to that."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    conjugate: bool = False
    negative: bool = False


@dataclass(eq=False, slots=True)
class Opaque:
    """Where an object of a class that we do not build would be: its class name, arguments and state."""

    name: str
    args: tuple = ()
    state: Any = None


@dataclass(frozen=True, slots=True)
class OpaqueClass:
    name: str


@dataclass(frozen=True, slots=True)
class StorageClass:
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Function:
    """One of the callables below; it takes the argument tuple that a pickle passes."""

    name: str
    call: Callable[[tuple], Any]


def misuse(name: str) -> CheckpointError:
    return CheckpointError(f"its pickle calls {name} in a way that no weight file does; do not use this file")


def call(function: Function, args: tuple) -> Any:
    if len(args) > MAX_ARGS:
        raise misuse(function.name)
    return function.call(args)


def is_shape(numbers: object) -> bool:
    return (
        isinstance(numbers, tuple)
        and len(numbers) <= MAX_DIMENSIONS
        and all(type(n) is int and n >= 0 for n in numbers)
    )


def checked(tensor: TensorRef) -> TensorRef:
    """`tensor`, if each of its elements lies inside its storage. Python's integers do not overflow."""
    shape, size = tensor.shape, prod(tensor.shape)
    available = tensor.storage.numel * tensor.storage.dtype.itemsize // tensor.dtype.itemsize
    if len(shape) != len(tensor.stride) or tensor.offset < 0 or prod(n or 1 for n in shape) >= 1 << 63:
        raise CheckpointError("a tensor of it has an impossible shape; do not use this file")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, tensor.stride, strict=True))
    if size and last >= available:
        raise CheckpointError(f"a tensor of it reaches element {last} of {available}; do not use this file")
    if size > available and size * tensor.dtype.itemsize > MAX_REPEATED:
        raise CheckpointError(f"a tensor of it repeats {available} numbers to {size}; do not use this file")
    return tensor


def tensor_v2(args: tuple, dtype: torch.dtype | None = None) -> TensorRef:
    """storage, offset, shape, stride, requires_grad, backward_hooks[, metadata]"""
    match args:
        case (StorageRef() as storage, int(offset), shape, stride, *rest) if is_shape(shape) and is_shape(
            stride
        ):
            dtype = dtype or storage.dtype
            flags = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
            conjugate, negative = flags.get("conj") is True, flags.get("neg") is True
            if negative and not (dtype.is_floating_point or dtype.is_complex):
                raise misuse("_rebuild_tensor")
            return checked(TensorRef(storage, dtype, offset, shape, stride, conjugate, negative))
    raise misuse("_rebuild_tensor")


def tensor_v3(args: tuple) -> TensorRef:
    """As v2, with a dtype after the backward hooks and a storage of plain bytes."""
    match args:
        case (storage, offset, shape, stride, grad, hooks, torch.dtype() as dtype, *metadata):
            return tensor_v2((storage, offset, shape, stride, grad, hooks, *metadata), dtype)
    raise misuse("_rebuild_tensor_v3")


def parameter(args: tuple) -> TensorRef:
    """tensor, requires_grad, backward_hooks[, state]"""
    match args:
        case (TensorRef() as tensor, *_):
            return tensor
    raise misuse("_rebuild_parameter")


def tensor_subclass(args: tuple) -> TensorRef:
    """rebuild function, class, its arguments, state: the class and the state are dropped"""
    match args:
        case (Function(call=function) as rebuild, _, tuple(inner), *_):
            if function in (tensor_v2, tensor_v3, parameter):
                return call(rebuild, inner)
    raise misuse("_rebuild_from_type_v2")


def mapping(args: tuple) -> dict:
    """OrderedDict, Counter, defaultdict: a dict. Python 2 gave OrderedDict a list of [key, value]."""
    match args:
        case () | (OpaqueClass(),):
            return {}
        case (dict(counts),):
            return counts
        case (list(items),) if all(isinstance(item, (list, tuple)) and len(item) == 2 for item in items):
            return {key: value for key, value in items if is_key(key)}
    raise misuse("OrderedDict")


def sequence(args: tuple) -> list | tuple:
    """torch.Size and sets: the list or tuple they are made from, unhashed."""
    match args:
        case ():
            return []
        case (list() | tuple() as items,):
            return items
    raise misuse("Size or set")


def encoded(args: tuple) -> bytes:
    """Bytes, as protocols below 3 spell them: a text of the first 256 characters."""
    match args:
        case ():
            return b""
        case (bytes(raw),):
            return raw
        case (str(text), "latin1" | "latin-1") if text.isascii() or max(text) < "\u0100":
            return text.encode("latin-1")
    raise misuse("_codecs.encode")


def complex_number(args: tuple) -> complex:
    match args:
        case (float(real), float(imaginary)):
            return complex(real, imaginary)
    raise misuse("complex")


def device(args: tuple) -> str:
    match args:
        case (str(name),):
            return name
        case (str(name), int(index)):
            return f"{name}:{index}"
    raise misuse("torch.device")


def numpy_scalar(args: tuple) -> Any:
    """dtype, bytes: a Python number for the plain types, else Opaque"""
    match args:
        case (Opaque(name="numpy.dtype", args=(str(code), *_), state=(_, "<" | "|", *_)), bytes(raw)):
            letter = NUMPY_CODES.get(code)
            if letter and len(raw) == struct.calcsize(letter):
                (number,) = struct.unpack(f"<{letter}", raw)
                return number
    return Opaque("numpy scalar")


NUMPY_CODES = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "b1": "?"}

# torch's element types by the names of their storage classes, and those that have none.
STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
}
NEW_DTYPES = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
NEW_DTYPES += (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)

BUILTINS = "builtins __builtin__"  # the second is their name in Python 2, and in protocols below 3
FUNCTIONS = (
    (tensor_v2, "torch._utils", "_rebuild_tensor _rebuild_tensor_v2"),
    (tensor_v3, "torch._utils", "_rebuild_tensor_v3"),
    (parameter, "torch._utils", "_rebuild_parameter _rebuild_parameter_with_state"),
    (tensor_subclass, "torch._tensor", "_rebuild_from_type_v2"),
    (mapping, "collections", "OrderedDict Counter defaultdict"),
    (sequence, "torch", "Size"),
    (sequence, BUILTINS, "set frozenset"),
    (encoded, "_codecs", "encode"),
    (encoded, BUILTINS, "bytes bytearray"),
    (complex_number, BUILTINS, "complex"),
    (device, "torch", "device"),
    (numpy_scalar, "numpy.core.multiarray numpy._core.multiarray", "scalar"),
)
# Classes that may be named, and even "called": the result is an Opaque record. OmegaConf's containers, which
# Lightning stores as hyper-parameters, name typing.Any and the built-in types.
CLASSES = (
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.modules.container", "ParameterDict"),
    ("numpy", "dtype float64 float32 float16 int64 int32 int16 int8 bool_"),
    ("typing", "Any"),
    (BUILTINS, "dict list tuple str int long float bool"),
)
OPAQUE_ROOTS = {"pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "ldm", "taming", "sgm"}

NAMES: dict[tuple[str, str], object] = {
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in (*STORAGES.values(), *NEW_DTYPES)},
    **{("torch", f"{kind}Storage"): StorageClass(dtype) for kind, dtype in STORAGES.items()},
    **{("torch.storage", f"{kind}Storage"): StorageClass(dtype) for kind, dtype in STORAGES.items()},
    **{
        (module, name): Function(name, function)
        for function, modules, names in FUNCTIONS
        for module in modules.split()
        for name in names.split()
    },
    **{
        (module, name): OpaqueClass(f"{module}.{name}")
        for modules, names in CLASSES
        for module in modules.split()
        for name in names.split()
    },
}


def find(module: str, name: str) -> object:
    """What a global name means here. Raises CheckpointError if a weight file has no business with it."""
    if (module, name) in NAMES:
        return NAMES[module, name]
    if module.split(".")[0] in OPAQUE_ROOTS:
        return OpaqueClass(f"{module}.{name}")
    shown = printable(f"{module}.{name}", 50)
    raise CheckpointError(f"its pickle names {shown}, which no weight file needs; do not use this file")


def is_key(key: object) -> bool:
    """Whether a dict keeps `key`: anything else could make hashing slow, and is dropped with its value."""
    return isinstance(key, (str, bytes, bool)) or key is None or (type(key) is int and abs(key) < MAX_KEY)
