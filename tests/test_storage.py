"""Weights held in fewer bytes: what that costs in precision, and that a LoRA comes and goes as ever."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ldm
from ldm import infotext, lora
from ldm.models import Models
from ldm.storage import STORED, held_in, stored
from tests.lora.test_lora import lora_tensors, write
from tests.test_offload import REQUEST, copied
from tests.tiny_families import tiny


def held(models: Models) -> int:
    """Bytes of all weights."""
    parts = [part for part in models.parts if isinstance(part, nn.Module)]
    return sum(w.numel() * w.itemsize for part in parts for w in part.parameters())


def pixels(models: Models, request: ldm.Request = REQUEST) -> Tensor:
    return torch.from_numpy(np.asarray(ldm.txt2img(models, request)[0], dtype=np.float32))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "class-f4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_layers_compute_in_the_dtype_of_their_input(name: str, dtype: torch.dtype):
    request = replace(REQUEST, prompt="7") if name == "class-f4" else REQUEST
    models = stored(copied(name), dtype)
    rounded = copied(name)  # the same rounding, but held in float32
    for part, other in zip(models.parts, rounded.parts, strict=True):
        assert isinstance(part, nn.Module)
        assert isinstance(other, nn.Module)
        for weight, plain in zip(part.parameters(), other.parameters(), strict=True):
            plain.data = weight.data.float()
    assert torch.equal(pixels(models, request), pixels(rounded, request))


def test_a_file_in_half_precision_is_held_as_it_is(tmp_path: Path):
    path = tmp_path / "half.safetensors"
    tiny("sd1").save(path, dtype=torch.float16)
    plain, half = ldm.load(path), ldm.load(path, storage=torch.float16)
    assert torch.equal(pixels(half), pixels(plain))
    assert half.denoiser.dtype == torch.float32
    parts = [part for part in half.parts if isinstance(part, nn.Module)]
    large = [
        m.get_parameter("weight") for part in parts for m in part.modules() if type(m) in STORED.values()
    ]
    assert {weight.dtype for weight in large} == {torch.float16}
    assert held(plain) - held(half) == 2 * sum(weight.numel() for weight in large)
    found = infotext.parse(ldm.txt2img(half, REQUEST)[0].info["parameters"]).fields
    assert found["Storage"] == "float16"
    assert half.unet.state_dict().keys() == plain.unet.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_lora_acts_and_leaves_every_bit(tmp_path: Path, dtype: torch.dtype):
    path = write(tmp_path / "style.safetensors", lora_tensors(tiny("sd1")))
    models = stored(copied(), dtype)
    before = [w.clone() for w in models.unet.parameters()]
    plain = pixels(models)
    with lora.applied(models, [(path, 0.5)]):
        assert not torch.equal(pixels(models), plain)
    for weight, old in zip(models.unet.parameters(), before, strict=True):
        assert weight.dtype == old.dtype
        assert torch.equal(weight.float(), old.float())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.0), (torch.float8_e4m3fn, 5.0)])
def test_the_embedded_model_still_draws_an_apple(dtype: torch.dtype, error: float):
    """Root mean square error in steps of 255, see docs/memory.md; its file is in float16."""
    request = ldm.Request(prompt="a red apple", steps=6, seed=7)
    wanted, found = pixels(ldm.load(), request), pixels(ldm.load(storage=dtype), request)
    difference = (wanted - found).square().mean().sqrt()
    assert difference <= error


def test_a_refiner_is_held_in_few_bytes_like_the_rest():
    models = stored(replace(tiny("sdxl"), refiner=tiny("sdxl-refiner")), torch.float16)
    assert models.refiner is not None
    assert held_in(models.unet) == held_in(models.refiner.unet) == torch.float16
