"""From the records of a pickle to tensors: every place of a tree, sharing, cycles, depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.formats.pickle_names import (
    Opaque,
    StorageRef,
    TensorRef,
)
from ldm.formats.rebuild import rebuild

FLOATS = StorageRef("0", torch.float32, 4)
TENSOR = TensorRef(FLOATS, torch.float32, 0, (4,), (1,))


def stored(ref: StorageRef) -> Tensor:
    return torch.arange(4.0).view(torch.uint8)


def nested(kind: str, levels: int) -> Any:
    tree: Any = TENSOR
    for _ in range(levels):
        match kind:
            case "list":
                tree = [tree]
            case "tuple":
                tree = (tree,)
            case "dict":
                tree = {"a": tree}
            case "state":
                tree = Opaque("a", (), tree)
            case "arguments":
                tree = Opaque("a", (tree,))
    return tree


# The arguments of an object are a tuple, one level deeper than the object.
@pytest.mark.parametrize(
    ("kind", "most"), [("list", 101), ("tuple", 101), ("dict", 101), ("state", 101), ("arguments", 50)]
)
def test_data_are_nested_at_most_100_deep(kind: str, most: int) -> None:
    assert rebuild(nested(kind, most), stored) is not None
    with pytest.raises(CheckpointError, match="nested over 100 deep"):
        rebuild(nested(kind, most + 1), stored)


def test_every_place_of_a_tree_is_rebuilt() -> None:
    opaque = Opaque("a", (TENSOR,), {"state": TENSOR})
    tree = rebuild({"list": [TENSOR, 1], "tuple": (TENSOR,), "opaque": opaque, "text": "a"}, stored)
    found = [tree["list"][0], tree["tuple"][0], tree["opaque"].args[0], tree["opaque"].state["state"]]
    assert [tensor.tolist() for tensor in found] == [[0, 1, 2, 3]] * 4
    assert len({tensor.data_ptr() for tensor in found}) == 1
    assert tree["list"][1] == 1
    assert tree["text"] == "a"


def test_what_is_shared_stays_shared_and_cycles_end() -> None:
    parameters = Opaque("torch.nn.modules.container.ParameterDict", (), {"_parameters": {"a": TENSOR}})
    shared: Any = ([TENSOR], {"b": TENSOR})
    cycle: list[Any] = []
    cycle.append(cycle)
    tree = rebuild([parameters, parameters, shared, shared, cycle], stored)
    assert tree[0]["a"].tolist() == [0, 1, 2, 3]
    assert tree[0] is tree[1]
    assert tree[2] is tree[3]
    assert tree[4][0] is tree[4]


def test_only_a_parameter_dict_is_unwrapped() -> None:
    full = "torch.nn.modules.container.ParameterDict"
    assert rebuild(Opaque(full, (), {"a": 1}), stored) == {"a": 1}
    assert rebuild(Opaque(full, (), None), stored).state is None
    assert rebuild(Opaque("ldm.B", (), {"_parameters": 1}), stored).state == {"_parameters": 1}


def test_views_are_those_of_the_record() -> None:
    def view(*record: Any) -> Tensor:
        return rebuild(TensorRef(*record), lambda ref: torch.arange(7, dtype=torch.uint8))

    bytes_ = StorageRef("0", torch.uint8, 7)
    assert view(bytes_, torch.uint8, 1, (2, 2), (3, 1)).tolist() == [[1, 2], [4, 5]]
    assert view(bytes_, torch.int16, 2, (1,), (1,)).tolist() == [0x0504]
    empty = view(bytes_, torch.float64, 99, (0, 3), (1, 1))
    assert (empty.dtype, empty.shape) == (torch.float64, (0, 3))
    far = view(bytes_, torch.uint8, 1 << 70, (0,), (1 << 70,))  # numbers that torch could not take
    assert far.shape == (0,)
    plain = TensorRef(FLOATS, torch.complex64, 0, (2,), (1,))
    assert rebuild(plain, stored).tolist() == [1j, 2 + 3j]
    assert rebuild(TensorRef(FLOATS, torch.complex64, 0, (2,), (1,), True), stored).tolist() == [-1j, 2 - 3j]
    assert rebuild(TensorRef(FLOATS, torch.float32, 0, (2,), (1,), False, True), stored).tolist() == [0, -1]
