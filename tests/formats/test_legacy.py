"""The layout of torch.save before version 1.6, byte by byte."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ldm.formats import legacy
from tests.formats.container import Container
from tests.hostile import build
from tests.hostile.build import FLOATS, patched, state_dict, storage, tensor
from tests.hostile.samples import legacy_files

GOOD = state_dict(tensor())


@pytest.fixture
def old(tmp_path: Path) -> Container:
    return Container(tmp_path, legacy)


WHY = {
    "bytes_after": "1 bytes follow its last tensor",
    "pickle_after": "bytes follow its last tensor",
    "zip_after": "bytes follow its last tensor",
    "protocol": "unknown version",
    "big_endian": "big-endian",
    "machine": "big-endian",
    "keys_missing": "list of storages",
    "keys_other": "list of storages",
    "keys_twice": "list of storages",
    "keys_number": "list of storages",
    "keys_nested": "list of storages",
    "storage_missing": "too short",
    "storage_short": "too short",
    "storage_long": "not the size",
}


def test_each_damage_of_the_old_layout_is_named(old: Container) -> None:
    files = legacy_files(GOOD)
    assert files.keys() == WHY.keys()
    for key, why in WHY.items():
        assert why in old.refusal(files[key]), key
    assert "plain Python pickle" in old.refusal(pickle.dumps(1, 2))


def test_storages_follow_in_the_order_of_their_keys(old: Container) -> None:
    pickled = state_dict(tensor(), tensor(storage("1", 2), shape=(2,)))
    tree = old.read(build.legacy(pickled, (FLOATS[8:], FLOATS), keys=("1", "0")))
    assert {key: t.tolist() for key, t in tree.items()} == {"t0": [1, 2, 3, 4], "t1": [3, 4]}
    whole = build.legacy(pickled, (FLOATS, FLOATS[8:]), keys=("0", "1"))
    assert old.read(whole)["t1"].tolist() == [3, 4]
    assert "too short" in old.refusal(whole[:-1])
    for end in range(9, 17):  # the second storage's number of elements is cut
        assert "too short" in old.refusal(whole[:-end])
    longer = build.legacy(pickled, (FLOATS, FLOATS), keys=("0", "1"))
    assert "storage '1' has not the size" in old.refusal(longer)
    for at in range(8):  # of the eight bytes that say how many numbers follow
        wrong = patched(whole, len(whole) - 16 + at, b"\x55")
        assert "storage '1' has not the size" in old.refusal(wrong)
