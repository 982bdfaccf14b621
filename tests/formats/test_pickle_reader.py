"""The reader of untrusted pickles, opcode by opcode: what each gives, costs and refuses."""

from __future__ import annotations

import pickletools
import struct
from typing import Any

import pytest
import torch

from ldm.errors import CheckpointError
from ldm.formats.pickle_names import (
    Opaque,
    OpaqueClass,
    StorageRef,
)
from ldm.formats.pickle_reader import OPCODES, Unpickler
from tests.hostile.build import name, storage, tensor, text

FLOATS = StorageRef("0", torch.float32, 4)
OPAQUE = name("ldm.a", "B")


def shown(value: Any) -> Any:
    """`value`, comparable: records of unknown classes are equal to no other."""
    if isinstance(value, Opaque):
        return "opaque", value.name, shown(value.args), shown(value.state)
    if isinstance(value, (list, tuple)):
        return type(value)(map(shown, value))
    return value


# What a pickle gives, and what it is charged beyond 10 for each opcode, the last (STOP) included.
OPCODE_CASES: dict[bytes, tuple[Any, int]] = {
    b"\x80\x01N": (None, 1),
    b"\x80\x05N": (None, 1),
    b"\x95" + bytes(8) + b"N": (None, 8),
    b"\x88": (True, 0),
    b"\x89": (False, 0),
    b"K\xff": (255, 1),
    b"M\x01\xff": (0xFF01, 32 + 2),
    b"J\xfe\xff\xff\xff": (-2, 32 + 4),
    b"\x8a\x02\x00\xff": (-256, 32 + 1 + 2),
    b"\x8a\x00": (0, 32 + 1),
    b"I00\n": (False, 3),
    b"I01\n": (True, 3),
    b"L01\n": (True, 3),
    b"I1\n": (1, 2),
    b"I-12\n": (-12, 4),
    b"L12L\n": (12, 4),
    b"L-" + b"9" * 39 + b"L\n": (1 - 10**39, 42),
    b"G\x3f\xf8" + bytes(6): (1.5, 32 + 8),
    b"X\x02\x00\x00\x00\xce\xa9": ("Ω", 64 + 4 + 2),
    b"\x8c\x02\xce\xa9": ("Ω", 64 + 1 + 2),
    b"\x8d\x02" + bytes(7) + b"\xce\xa9": ("Ω", 64 + 8 + 2),
    b"\x8c\x03\xed\xb3\xbf": ("\udcff", 64 + 1 + 3),
    b"B\x01\x00\x00\x00\xff": (b"\xff", 64 + 4 + 1),
    b"C\x01\xff": (b"\xff", 64 + 1 + 1),
    b"\x8e\x01" + bytes(7) + b"\xff": (b"\xff", 64 + 8 + 1),
    b"\x96\x01" + bytes(7) + b"\xff": (b"\xff", 64 + 8 + 1),
    b"T\x01\x00\x00\x00a": ("a", 64 + 4 + 1),
    b"T\x01\x00\x00\x00\xff": (b"\xff", 64 + 4 + 1),
    b"U\x01a": ("a", 64 + 1 + 1),
    b"U\x01\xff": (b"\xff", 64 + 1 + 1),
    b")": ((), 64),
    b"(NNt": ((None, None), 64 + 64 + 16),
    b"(NN\x91": ((None, None), 64 + 64 + 16),
    b"NN\x85": ((None,), 64 + 8),
    b"NN\x86": ((None, None), 64 + 16),
    b"NNN\x87": ((None, None, None), 64 + 24),
    b"]": ([], 64),
    b"\x8f": ([], 64),
    b"(NNl": ([None, None], 64 + 64 + 16),
    b"]Na": ([None], 64 + 8),
    b"](NNe": ([None, None], 64 + 64 + 16),
    b"\x8f(NN\x90": ([None, None], 64 + 64 + 16),
    b"}": ({}, 64),
    b"(NNd": ({None: None}, 64 + 64 + 100),
    b"}NNs": ({None: None}, 64 + 100),
    b"}(NK\x01\x88Nu": ({None: 1, True: None}, 64 + 64 + 200 + 1),
    b"}" + OPAQUE + b"Ns": ({}, 64 + 100 + 8 + 64),
    b"N\x880": (None, 0),
    b"N(0": (None, 64),
    b"N(NN1": (None, 64),
    b"\x88q\x05Nh\x05": (True, 64 + 1 + 1),
    b"\x88r\x00\x01\x00\x00Nj\x00\x01\x00\x00": (True, 64 + 4 + 4),
    b"\x88\x94N\x94h\x00": (True, 64 + 64 + 1),
    OPAQUE: (OpaqueClass("ldm.a.B"), 8 + 64),
    text("ldm.a") + text("B") + b"\x93": (OpaqueClass("ldm.a.B"), 2 * (64 + 4) + 5 + 1 + 64),
    OPAQUE + b")R": (("opaque", "ldm.a.B", (), None), 8 + 64 + 64 + 64),
    OPAQUE + b"N\x85\x81": (("opaque", "ldm.a.B", (None,), None), 8 + 64 + 72 + 64),
    OPAQUE + b")R\x88b": (("opaque", "ldm.a.B", (), True), 8 + 64 + 64 + 64),
    OPAQUE + b")RNa": (("opaque", "ldm.a.B", (), None), 8 + 64 + 64 + 64),
    OPAQUE + b")RNNs": (("opaque", "ldm.a.B", (), None), 8 + 64 + 64 + 64),
    OPAQUE + b")R(Nu": (("opaque", "ldm.a.B", (), None), 8 + 64 + 64 + 64 + 64),
    b"}\x88b": ({}, 64),
    name("torch", "Size") + b")\x85R": ((), 11 + 64 + 64 + 72 + 64),
    name("_codecs", "encode") + text("abc") + text("latin1") + b"\x86R": (
        b"abc",
        15 + 64 + (64 + 4 + 3) + (64 + 4 + 6) + (64 + 16) + 64 + 3,
    ),
    name("collections", "OrderedDict") + b"](N\x88\x86\x88N\x86e\x85R": (
        {None: True, True: None},
        24 + 64 + 64 + 64 + 2 * (64 + 16) + 16 + (64 + 8) + 64 + 100,
    ),
}


@pytest.mark.parametrize("pickled", OPCODE_CASES, ids=repr)
def test_every_opcode_gives_and_costs_what_it_should(pickled: bytes) -> None:
    expected, cost = OPCODE_CASES[pickled]
    machine = Unpickler(b"..." + pickled + b".more", 3)
    found = machine.load()
    assert type(found) is type(expected) or isinstance(found, Opaque)
    assert shown(found) == expected
    assert machine.at == len(b"..." + pickled + b".")
    assert 50_000_000 - machine.budget - cost == 10 * len(list(pickletools.genops(pickled + b".")))


def test_the_cases_above_are_all_opcodes() -> None:
    used = {opcode.code for pickled in OPCODE_CASES for opcode, _, _ in pickletools.genops(pickled + b".")}
    assert {chr(code) for code in OPCODES} == used - {"."} | {"Q"}


def load(pickled: bytes) -> Any:
    return Unpickler(pickled + b".").load()


def refused(pickled: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        load(pickled)
    return str(error.value)


def test_the_budget_is_used_to_the_last_byte() -> None:
    for budget, enough in ((20, True), (19, False)):
        machine = Unpickler(b"N.")
        machine.budget = budget
        if enough:
            assert machine.load() is None
        else:
            with pytest.raises(CheckpointError, match="far larger"):
                machine.load()


def test_a_text_has_at_most_4_million_bytes() -> None:
    assert len(load(b"B" + struct.pack("<I", 4_000_000) + bytes(4_000_000))) == 4_000_000
    assert "4000001 bytes" in refused(b"B" + struct.pack("<I", 4_000_001) + bytes(4_000_001))


def test_a_text_that_ends_with_the_file_is_whole_and_a_longer_one_is_not() -> None:
    machine = Unpickler(b"C\x02ab")
    with pytest.raises(CheckpointError, match="damaged"):
        machine.load()
    assert machine.stack == [b"ab"]
    machine = Unpickler(b"C\x03ab")
    with pytest.raises(CheckpointError, match="damaged"):
        machine.load()
    assert machine.stack == []


def test_names_have_at_most_500_characters() -> None:
    long = "ldm." + "a" * 495  # with its newline, a line of 500
    assert load(name(long, "B")) == OpaqueClass(f"{long}.B")
    assert "damaged" in refused(name(long + "a", "B"))
    assert "damaged" in refused(name(long, "BC"))
    # A line ends within the file, not in what follows it.
    assert "damaged" in refused(b"cldm\nB")


@pytest.mark.parametrize("line", ["", "-", "--1", "1-", "1L1", "+1", "1_0", " 1", "\u0661", "9" * 40, "0x1"])
def test_decimals_are_digits_and_few(line: str) -> None:
    assert "damaged" in refused(f"I{line}\n".encode())


def test_zero_decimals_and_long_ones_are_numbers() -> None:
    assert [load(f"I{line}\n".encode()) for line in ("0", "-0", "001", "1" * 39)] == [0, 0, 1, int("1" * 39)]


@pytest.mark.parametrize(
    "pickled",
    {
        "protocol 0": b"\x80\x00N",
        "protocol 6": b"\x80\x06N",
        "a stack below the mark": b"N(\x85",
        "too few values": b"N\x86",
        "no mark": b"Nt",
        "append to a tuple": b")Na",
        "append to a dict": b"}Na",
        "items of a list": b"]NNs",
        "items of a text": text("a") + b"NNs",
        "an odd number of items": b"}(Nu",
        "state of a list": b"]Nb",
        "state of a text": text("a") + b"Nb",
        "arguments in a list": OPAQUE + b"]R",
        "arguments that are no list": OPAQUE + b"NR",
        "call of a tensor type": name("torch", "float32") + b")R",
        "call of a storage": name("torch", "FloatStorage") + b")R",
        "call of a text": text("a") + b")R",
        "call of a record": OPAQUE + b")R)R",
        "name of a number": b"K\x01" + text("a") + b"\x93",
        "name in a number": text("a") + b"K\x01\x93",
        "an unset memo": b"h\x00",
        "an unset long memo": b"Nq\x00j\x01\x00\x00\x00",
        "memo of nothing": b"q\x00",
        "a bad text": b"X\x01\x00\x00\x00\xff",
        "a bad name": b"c\xff\nB\n",
        "the end inside a number": b"J\x01",
        "an unknown opcode": b"2",
        "nothing": b"",
    }.values(),
    ids=repr,
)
def test_what_makes_no_sense_is_refused(pickled: bytes) -> None:
    assert refused(pickled).isprintable()


def cost_of_the_last_opcode(pickled: bytes) -> int:
    without, whole = Unpickler(pickled[:-1] + b"."), Unpickler(pickled + b".")
    without.load()
    whole.load()
    return without.budget - whole.budget


def test_storages_cost_as_much_as_a_record_and_tensors_more() -> None:
    assert cost_of_the_last_opcode(storage()) == 10 + 64
    assert cost_of_the_last_opcode(tensor()) == 10 + 64 + 400


def test_a_storage_is_described_once_and_for_all() -> None:
    machine = Unpickler(storage() + storage(extra=b"N") + storage("1", 0) + b"\x87.")
    assert machine.load() == (FLOATS, FLOATS, StorageRef("1", torch.float32, 0))
    assert machine.storages == {"0": FLOATS, "1": StorageRef("1", torch.float32, 0)}
    assert "two ways" in refused(storage() + storage(numel=5))
    assert "two ways" in refused(storage() + storage(kind="IntStorage"))


@pytest.mark.parametrize(
    "numbers",
    [
        storage(numel=-1),
        storage(numel=1.5),
        storage(0),
        storage(extra=b"K\x01"),
        storage(extra=b"NN"),
        storage().replace(b"storage", b"sturage"),
        storage().replace(text("cpu"), b"N"),
        storage().replace(name("torch", "FloatStorage"), name("torch", "float32")),
        b"(tQ",
        text("0") + b"Q",
    ],
    ids=repr,
)
def test_only_storages_are_persistent(numbers: bytes) -> None:
    assert "something else" in refused(numbers)
