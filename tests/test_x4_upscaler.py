"""The Stable Diffusion x4 upscaler by itself; its numbers are compared in tests/peers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.errors import CheckpointError, RequestError
from ldm.upscalers import load_latent
from ldm.upscalers.x4 import X4Upscaler
from tests.tiny_families import tiny

SMALL = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_is_found_by_what_its_file_holds(tmp_path: Path) -> None:
    tiny("x4-upscaler").save(tmp_path / "any name.safetensors")
    upscaler = load_latent(tmp_path / "any name.safetensors")
    assert isinstance(upscaler, X4Upscaler)
    drawn = replace(upscaler, steps=2, prompt="a cat").draw(SMALL)
    assert torch.equal(drawn, X4Upscaler(tiny("x4-upscaler"), steps=2, prompt="a cat").draw(SMALL))


def test_prompt_seed_and_noise_level_count() -> None:
    upscaler = X4Upscaler(tiny("x4-upscaler"), steps=2, prompt="a cat")
    drawn = upscaler.draw(SMALL)
    for setting in ({"prompt": "a dog"}, {"negative_prompt": "a dog"}, {"seed": 1}, {"noise_level": 100}):
        assert not torch.equal(replace(upscaler, **setting).draw(SMALL), drawn)
    # Without guidance the negative prompt is not even read.
    plain = replace(upscaler, cfg_scale=1.0)
    assert torch.equal(plain.draw(SMALL), replace(plain, negative_prompt="a dog").draw(SMALL))


def test_what_cannot_work_is_refused() -> None:
    models = tiny("x4-upscaler")
    for settings in ({"noise_level": 351}, {"noise_level": -1}, {"cfg_scale": -1.0}, {"steps": 0}):
        with pytest.raises(RequestError):
            X4Upscaler(models, **settings)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no text encoder"):
        X4Upscaler(replace(models, text=()))
