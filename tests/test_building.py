"""What a network's weights become on their way from the file."""

from pathlib import Path

import pytest
import torch

from ldm import building
from ldm.building import Destination, converted
from ldm.formats import read, write_safetensors

CPU = torch.device("cpu")


@pytest.mark.parametrize("numbers", [0, 1, building.PIECE - 1, building.PIECE, 3 * building.PIECE + 7])
def test_a_converted_weight_is_that_of_torch_whatever_its_size(numbers: int) -> None:
    weight = torch.linspace(-3, 3, numbers).half()
    new, finite = converted(weight, torch.float32)
    assert finite
    assert new.dtype == torch.float32
    assert torch.equal(new, weight.float())


def test_a_transposed_weight_is_converted() -> None:
    weight = torch.randn(700, 900).half().T
    assert torch.equal(converted(weight, torch.float32)[0], weight.float())


@pytest.mark.parametrize("place", [0, building.PIECE, 2 * building.PIECE + 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_in_any_piece_is_seen(place: int, bad: float) -> None:
    weight = torch.zeros(2 * building.PIECE + 5, dtype=torch.float16)
    weight[place] = bad
    assert not converted(weight, torch.float32)[1]


def test_a_number_that_overflows_on_the_way_is_seen() -> None:
    assert not converted(torch.full((4,), 1e6), torch.float16)[1]


def test_a_weight_in_the_right_dtype_is_not_copied(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", {"w": torch.ones(9)})
    file = read(tmp_path / "w.safetensors")
    to = Destination(CPU, torch.float32, read_once=lambda w: pytest.fail("nothing is copied"))
    assert to.bring(file.tensors["w"], torch.float32) == (file.tensors["w"], True)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells the memory of a map")
def test_the_pages_of_a_file_are_given_back_once_converted(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.full((1000, 1000 + i), i + 0.5, dtype=torch.float16) for i in range(4)}
    path = tmp_path / "w.safetensors"
    write_safetensors(path, weights)
    file = read(path)
    to = Destination(CPU, torch.float32, read_once=file.read_once)
    kept = {name: to.bring(w, torch.float32)[0] for name, w in file.tensors.items()}
    # What remains, of 8 MB, are pages around the ends of each weight: a page fault brings in 16 or so.
    assert resident(path) < 2**20
    for name, w in weights.items():  # the file is still there to be read
        assert torch.equal(kept[name], w.float())
        assert torch.equal(file.tensors[name], w)


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    raise AssertionError("the file is not mapped")


def test_a_tensor_from_elsewhere_is_left_alone(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", {"w": torch.ones(5000)})
    other = torch.full((5000,), 2.0)
    with read(tmp_path / "w.safetensors").read_once(other):
        assert bool((other == 2).all())
    assert bool((other == 2).all())
