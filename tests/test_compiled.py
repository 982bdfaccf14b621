"""The UNet compiles to one graph, which serves all steps, with and without LoRA files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import ldm
from ldm import lora, offload
from ldm.compiled import fast
from ldm.samplers import SAMPLERS
from tests.lora.test_lora import lora_tensors, write
from tests.test_offload import REQUEST, copied
from tests.tiny_families import tiny


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs from before, and settings of torch as they were."""
    before = torch._dynamo.config.recompile_limit, torch.backends.cudnn.benchmark
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit, torch.backends.cudnn.benchmark = before


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["embedded", "sdxl", "class-f4", "unconditional"])
def test_one_graph_serves_all_steps(name: str):
    prompt = {"class-f4": "7", "unconditional": ""}.get(name, "a cat")
    request = replace(REQUEST, prompt=prompt, steps=4, batch_size=2)
    wanted = ldm.txt2img(tiny(name), request)
    found = ldm.txt2img(fast(copied(name), backend="eager", mode=None), request)
    assert graphs() == 1
    for one, other in zip(found, wanted, strict=True):
        assert (
            abs(np.asarray(one, dtype=int) - np.asarray(other)).max() <= 1
        )  # channels-last rounds otherwise


def test_a_lora_needs_no_new_graph(tmp_path: Path):
    path = write(tmp_path / "style.safetensors", lora_tensors(tiny("sd1")))
    models = fast(copied(), backend="eager", mode=None)
    plain = ldm.txt2img(models, REQUEST)[0]
    with lora.applied(models, [(path, 0.5)]):
        assert ldm.txt2img(models, REQUEST)[0].tobytes() != plain.tobytes()
    assert ldm.txt2img(models, REQUEST)[0].tobytes() == plain.tobytes()
    assert graphs() == 1


def test_another_size_is_another_graph_and_the_first_remains():
    models = fast(copied(), backend="eager", mode=None)
    for width in (64, 128, 64, 128):
        ldm.txt2img(models, replace(REQUEST, width=width))
    assert graphs() == 2


def test_sizes_are_compiled_beforehand_and_the_time_is_told(caplog: pytest.LogCaptureFixture):
    models = fast(copied("sdxl"), backend="eager", mode=None, sizes=[(64, 64, 2)])
    assert "compiled in" in caplog.text
    assert graphs() == 1
    ldm.txt2img(models, REQUEST)
    assert graphs() == 1


def test_an_offloaded_model_is_not_compiled():
    with pytest.raises(ldm.RequestError, match="either --fast or --lowvram"):
        fast(offload.offloaded(copied(), "cpu"))


class Syncs(TorchDispatchMode):
    """Lists what makes a program wait for a graphics card: numbers that leave it, results of unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("DPM adaptive", "DPM fast")])
def test_no_step_waits_for_the_device(sampler: str):
    request = replace(REQUEST, sampler=sampler, width=32, height=32, steps=5)
    steps = ldm.sample(tiny("sd1"), request)
    next(steps)  # before it, the encoded prompt was looked at; after the last, the result is
    with Syncs() as syncs:
        for _ in range(3):
            next(steps)
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert syncs.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_same_pictures_on_a_graphics_card(mode: Any):
    request = ldm.Request(prompt="a red apple", steps=8, batch_size=2)
    wanted = ldm.txt2img(ldm.load(device="cuda"), request)
    found = ldm.txt2img(fast(ldm.load(device="cuda"), mode=mode), request)
    for one, other in zip(found, wanted, strict=True):
        assert abs(np.asarray(one, dtype=int) - np.asarray(other)).mean() < 2
