"""What a run will take is known before it is loaded; afterwards all of it is given back."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ldm
from ldm import memory
from ldm.memory import Way
from ldm.models import Limits
from tests.tiny_families import tiny

REQUEST = ldm.Request(prompt="a cat", width=512, height=512)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    tiny("sd1").save(path)
    return path


def test_weights_are_counted_to_the_byte(file: Path):
    model = memory.sizes(file)
    for part, modules in (
        ("unet", [tiny("sd1").unet]),
        ("vae", [tiny("sd1").vae]),
        ("text", tiny("sd1").text),
    ):
        held = sum(w.numel() for module in modules if module for w in module.parameters())
        assert sum(torch.Size(shape).numel() for shape in model.part(part).values()) == held
    assert sum(len(block) for block in model.blocks()) == len(model.part("unet"))
    assert len(model.blocks()) == 1 + 4 + 1 + 4 + 1  # time_embed, input, middle, output blocks, out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_what_storage_saves_is_what_is_predicted(file: Path, dtype: torch.dtype):
    model = memory.sizes(file)

    def predicted(way: Way) -> int:
        return memory.predict(model, REQUEST, way) - max(memory.working(model, REQUEST, way))

    def held(models: ldm.Models) -> int:
        networks = (models.unet, models.vae, *models.text)
        return sum(w.numel() * w.itemsize for network in networks if network for w in network.parameters())

    stored = Way(storage=dtype)
    assert held(stored.load(file)) - held(Way().load(file)) == predicted(stored) - predicted(Way())


def test_each_way_needs_less_where_it_shall(file: Path):
    model = memory.sizes(file)
    request = replace(REQUEST, batch_size=4)
    half = Way(device="cuda", dtype=torch.float16)
    need = [
        memory.predict(model, request, way)
        for way in (half, replace(half, lowvram="parts"), replace(half, lowvram="blocks"))
    ]
    assert need[0] > need[1] >= need[2]
    whole, strips = (memory.working(model, request, Way(limits=Limits(whole=w))) for w in (2**40, 0))
    assert strips[0] == whole[0]
    assert memory.working(model, request, Way(limits=Limits(rows=1)))[0] == whole[0] // 8  # of 4 guided ones


def test_a_budget_is_met_in_the_fastest_way(file: Path):
    model = memory.sizes(file)
    request = replace(REQUEST, width=1024, height=1024, batch_size=4)
    needs = sorted({memory.predict(model, request, way) for way in memory.ways("cpu")})
    assert len(needs) > 3
    assert memory.fit(file, request, budget=2**40) == next(iter(memory.ways("cpu")))
    for need in needs:
        way = memory.fit(file, request, budget=need)
        assert memory.predict(model, request, way) <= need
    with pytest.raises(ldm.RequestError, match="GB of memory at least"):
        memory.fit(file, request, budget=needs[0] - 1)


def test_a_way_is_held_to_when_loading(file: Path):
    way = Way(storage=torch.float16, limits=Limits(rows=1, whole=0))
    models = way.load(file)
    assert models.limits == way.limits
    picture = ldm.txt2img(models, replace(REQUEST, width=64, height=64, steps=1))[0]
    assert picture.size == (64, 64)


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(ldm.CheckpointError):
        memory.sizes(path)


GIVEN_BACK = """
import gc, sys
import ldm
from benchmarks.memory import resident

def draw():
    models = ldm.load()
    ldm.txt2img(models, ldm.Request(prompt="a red apple", steps=2))

draw()  # what torch keeps for itself, whatever comes
gc.collect()
before = resident("VmRSS")
for _ in range(3):
    models = ldm.load()
    ldm.txt2img(models, ldm.Request(prompt="a red apple", steps=2))
    held = resident("VmRSS") - before
    del models
    gc.collect()
print(held, resident("VmRSS") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_memory_returns_when_models_are_deleted():
    command = [sys.executable, "-c", GIVEN_BACK]
    # Otherwise glibc keeps freed blocks of up to 32 MB for later, which hides what models leave behind.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    held, left = (int(number) / 2**20 for number in output.split())
    assert held > 40  # MB: the model has 66
    assert left < 15
