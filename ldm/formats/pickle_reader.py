"""A reader of pickles that can build nothing but inert data.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program names.
This one is written for weight files: it interprets the opcodes of data, looks names up in `pickle_names`,
and imports and calls nothing else. What it returns is made of None, bool, int, float, complex, str, bytes,
list, tuple, dict, torch.dtype and the records of `pickle_names`. A budget bounds the time and memory that
any pickle can cost.

The opcodes: https://github.com/python/cpython/blob/3.11/Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Protocol

from ldm.errors import CheckpointError
from ldm.formats.mapped import printable
from ldm.formats.pickle_names import (
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

BUDGET = 50_000_000  # bytes of Python objects, roughly, as charged below
OPCODE_COST = 10
NUMBER_COST = 32
OBJECT_COST = 64  # of an empty text or container, a record, an entry of the memo
ENTRY_COST = 50  # of a key or a value of a dict
TENSOR_COST = 400  # of the torch tensor that it will become
MAX_TEXT = 4_000_000  # bytes of one text
MAX_NAME = 500  # characters of a global name


class Buffer(Protocol):
    """Bytes or a memory map."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: Any, /) -> Any: ...
    def find(self, sub: bytes, start: int, end: int, /) -> int: ...


class Unpickler:
    """Reads one pickle of `data`, from byte `start` on. Afterwards `at` is the byte after it."""

    def __init__(self, data: Buffer, start: int = 0) -> None:
        self.data, self.at, self.end, self.budget = data, start, len(data), BUDGET
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each MARK
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRef] = {}  # as first named

    def load(self) -> Any:
        """The pickled value. Raises CheckpointError for anything but inert data."""
        try:
            while True:
                opcode = self.data[self.at]
                self.at += 1
                self.spend(OPCODE_COST)
                if opcode == STOP:
                    return self.stack.pop()
                if opcode not in OPCODES:
                    raise CheckpointError(
                        f"its pickle uses opcode {opcode:#04x}, which weights never need; do not use it"
                    )
                OPCODES[opcode](self)
        except IndexError:  # the pickle ends, or pops from an empty stack
            raise damaged() from None

    def spend(self, cost: int) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise CheckpointError(
                "its pickle is far larger or more complex than that of any weight file; do not use this file"
            )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    # Arguments that follow an opcode.

    def take(self, size: int) -> bytes:
        if size > MAX_TEXT:
            raise CheckpointError(
                f"its pickle holds a text of {size} bytes, which no weight file needs; do not use this file"
            )
        raw = self.data[self.at : self.at + size]
        self.at += size
        if self.at > self.end:
            raise damaged()
        self.spend(size)
        return raw

    def number(self, size: int) -> int:
        """A natural number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def integer(self, size: int, *, signed: bool = True) -> int:
        """A number of `size` bytes that will be pushed."""
        self.spend(NUMBER_COST)
        return int.from_bytes(self.take(size), "little", signed=signed)

    def real(self) -> float:
        self.spend(NUMBER_COST)
        (number,) = struct.unpack(">d", self.take(8))
        return number

    def text(self, size: int) -> bytes:
        """The bytes of a text whose length is the next `size` bytes."""
        self.spend(OBJECT_COST)
        return self.take(self.number(size))

    def line(self) -> str:
        """A text that ends with a newline."""
        end = self.data.find(b"\n", self.at, min(self.at + MAX_NAME, self.end))
        if end < 0:
            raise damaged()
        return decoded(self.take(end + 1 - self.at)[:-1])

    def items(self) -> list[Any]:
        """What was pushed since the last MARK."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def top(self, count: int) -> list[Any]:
        """The last `count` values."""
        if len(self.stack) < count:
            raise damaged()
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    # Opcodes.

    def proto(self) -> None:
        if not 1 <= (protocol := self.number(1)) <= 5:
            raise CheckpointError(f"its pickle has the unknown protocol {protocol}; do not use this file")

    def mark(self) -> None:
        self.spend(OBJECT_COST)
        self.marked.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.items()

    def container(self, value: Any) -> None:
        self.spend(OBJECT_COST + (8 * len(value) if value else 0))
        self.push(value)

    def new_dict(self) -> None:
        items = self.items()
        self.container({})
        self.set_items(items)

    def append(self, values: list[Any]) -> None:
        match self.stack[-1]:
            case list(target):
                self.spend(8 * len(values))
                target.extend(values)
            case Opaque():
                pass
            case _:
                raise damaged()

    def set_items(self, items: list[Any]) -> None:
        match self.stack[-1]:
            case dict(target) if len(items) % 2 == 0:
                self.spend(ENTRY_COST * len(items))
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if is_key(key):
                        target[key] = value
            case Opaque():
                pass
            case _:
                raise damaged()

    def remember(self, key: int) -> None:
        self.spend(OBJECT_COST)
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise damaged()
        self.push(self.memo[key])

    def decimal(self) -> None:
        """INT and LONG of protocols 0 and 1, which also spell False as 00 and True as 01."""
        line = self.line()
        digits = line.removesuffix("L").removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 40):
            raise damaged()
        self.push(line == "01" if line in ("00", "01") else int(line.removesuffix("L")))

    def global_name(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= MAX_NAME):
            raise damaged()
        self.spend(OBJECT_COST)
        self.push(find(module, name))

    def call(self, args: object) -> None:
        """REDUCE and NEWOBJ: the only place where a name on the stack acts."""
        function = self.stack.pop()
        if not isinstance(args, tuple):
            raise damaged()
        self.spend(OBJECT_COST)
        match function:
            case OpaqueClass(name=name):
                self.push(Opaque(name, args))
            case Function():
                match args:  # whose size can count
                    case (str(text), *_):
                        self.spend(len(text))
                    case (list(items), *_):
                        self.spend(ENTRY_COST * len(items))
                result = call(function, args)
                self.spend(TENSOR_COST if isinstance(result, TensorRef) else 0)
                self.push(result)
            case _:
                raise CheckpointError("its pickle calls something that is no function; do not use this file")

    def build(self) -> None:
        """Set an object's state. A dict's is dropped: torch keeps version numbers there."""
        state = self.stack.pop()
        match self.stack[-1]:
            case Opaque() as target:
                target.state = state
            case dict():
                pass
            case _:
                raise damaged()

    def persistent(self) -> None:
        """A storage: ("storage", class, key, device, numel[, None])."""
        match self.stack.pop():
            case ("storage", StorageClass(dtype), str(key), str(), int(numel), *view) if (
                numel >= 0 and view in ([], [None])
            ):
                storage = StorageRef(key, dtype, numel)
            case _:
                raise CheckpointError(
                    "its pickle asks for something else than stored numbers; do not use this file"
                )
        if self.storages.setdefault(key, storage) != storage:
            raise CheckpointError(
                f"its pickle describes the storage '{printable(key, 20)}' in two ways; do not use this file"
            )
        self.spend(OBJECT_COST)
        self.push(storage)


def damaged() -> CheckpointError:
    return CheckpointError("its pickle is damaged or incomplete; download the file again")


def decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")  # as Python pickles the names of files that are not UTF-8
    except UnicodeDecodeError:
        raise damaged() from None


def decoded_python2(raw: bytes) -> str | bytes:
    """A Python 2 string, which may be text or bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


STOP = ord(".")
_ACTIONS: dict[bytes, Callable[[Unpickler], object]] = {
    b"\x80": Unpickler.proto,
    b"\x95": lambda m: m.number(8),  # FRAME, a hint for readers of streams
    # constants and numbers
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.integer(2, signed=False)),
    b"J": lambda m: m.push(m.integer(4)),
    b"\x8a": lambda m: m.push(m.integer(m.number(1))),
    b"I": Unpickler.decimal,
    b"L": Unpickler.decimal,
    b"G": lambda m: m.push(m.real()),
    # texts
    b"X": lambda m: m.push(decoded(m.text(4))),
    b"\x8c": lambda m: m.push(decoded(m.text(1))),
    b"\x8d": lambda m: m.push(decoded(m.text(8))),
    b"B": lambda m: m.push(m.text(4)),
    b"C": lambda m: m.push(m.text(1)),
    b"\x8e": lambda m: m.push(m.text(8)),
    b"\x96": lambda m: m.push(m.text(8)),
    b"T": lambda m: m.push(decoded_python2(m.text(4))),
    b"U": lambda m: m.push(decoded_python2(m.text(1))),
    # containers; sets are kept as lists, unhashed
    b"(": Unpickler.mark,
    b")": lambda m: m.container(()),
    b"t": lambda m: m.container(tuple(m.items())),
    b"\x85": lambda m: m.container(tuple(m.top(1))),
    b"\x86": lambda m: m.container(tuple(m.top(2))),
    b"\x87": lambda m: m.container(tuple(m.top(3))),
    b"\x91": lambda m: m.container(tuple(m.items())),
    b"]": lambda m: m.container([]),
    b"\x8f": lambda m: m.container([]),
    b"l": lambda m: m.container(m.items()),
    b"a": lambda m: m.append(m.top(1)),
    b"e": lambda m: m.append(m.items()),
    b"\x90": lambda m: m.append(m.items()),
    b"}": lambda m: m.container({}),
    b"d": lambda m: m.new_dict(),
    b"s": lambda m: m.set_items(m.top(2)),
    b"u": lambda m: m.set_items(m.items()),
    # stack and memo
    b"0": Unpickler.pop,
    b"1": Unpickler.items,
    b"q": lambda m: m.remember(m.number(1)),
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.recall(m.number(1)),
    b"j": lambda m: m.recall(m.number(4)),
    # names and calls
    b"c": lambda m: m.global_name(m.line(), m.line()),
    b"\x93": lambda m: m.global_name(*m.top(2)),
    b"R": lambda m: m.call(m.stack.pop()),
    b"\x81": lambda m: m.call(m.stack.pop()),
    b"b": Unpickler.build,
    b"Q": Unpickler.persistent,
}
OPCODES = {ord(code): action for code, action in _ACTIONS.items()}
