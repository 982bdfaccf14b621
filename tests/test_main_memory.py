"""A lack of main memory is an error of torch's, which ways to need less can answer."""

import resource
from pathlib import Path

import pytest
import torch

from ldm import main_memory
from ldm.main_memory import bounded
from ldm.stepdown import out_of_memory

pytestmark = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells what is free")


def available() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    return 1024 * int(line.split()[1])


def test_more_than_there_is_is_refused_and_less_is_not():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded(torch.device("cpu")):
        with pytest.raises(RuntimeError) as error:
            torch.empty(available() * 2, dtype=torch.uint8)
        assert out_of_memory(error.value)
        assert len(torch.zeros(10_000_000)) == 10_000_000
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_the_limit_is_what_is_free_and_a_lower_one_of_the_user_stays():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded(torch.device("cpu")):
        limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
        assert 0.5 * available() < limit
        with bounded(torch.device("cpu")):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= limit
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == limit
    with bounded(torch.device("meta")):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_files_in_the_memory_of_a_container_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint that was read counts as used memory of a container, until something else needs it."""
    for name, text in (
        ("memory.max", "2000000"),
        ("memory.current", "1900000"),
        ("memory.stat", "anon 1000\ninactive_file 1500000\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(main_memory, "CONTAINER", tmp_path)
    assert main_memory.free() == 1_600_000
