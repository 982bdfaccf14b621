"""Promise 21: never a black picture. NaN and infinity are found in every path, tried again, or named."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from PIL import Image
from torch import nn

import ldm
from ldm import Edit, Hires, LdmError, Models, Request
from ldm.samplers import SAMPLERS
from ldm.storage import stored
from ldm.upscalers import latent
from ldm.upscalers.ldsr import LDSR
from ldm.upscalers.x4 import X4Upscaler
from scripts.txt2img import main as txt2img
from tests.tiny_families import tiny

REQUEST = Request(prompt="a cat", width=16, height=16, steps=2, seed=1)
PICTURE = Image.new("RGB", (16, 16), "red")
MASK = Image.new("L", (16, 16))
MASK.paste(255, (8, 0, 16, 16))

PATHS: dict[str, Callable[[Models], list[Image.Image]]] = {
    "txt2img": lambda models: ldm.txt2img(models, REQUEST),
    "hires": lambda models: ldm.txt2img(models, replace(REQUEST, hires=Hires(scale=2.0))),
    "hires, pixels": lambda models: ldm.txt2img(
        models, replace(REQUEST, hires=Hires(scale=2.0, upscaler="Lanczos"))
    ),
    "img2img": lambda models: ldm.img2img(models, REQUEST, PICTURE),
    "inpaint": lambda models: ldm.inpaint(models, replace(REQUEST, edit=Edit()), PICTURE, MASK),
}


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_weight(module: ModuleT, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> ModuleT:
    """A copy of a network with one weight changed."""
    twin = copy.deepcopy(module)
    weight = twin.get_parameter(name)
    weight.data = change(weight.data)
    return twin


def nan(weight: torch.Tensor) -> torch.Tensor:
    return torch.full_like(weight, torch.nan)


def poisoned(part: str) -> Models:
    models = tiny("sd1")
    assert models.vae is not None
    match part:
        case "the UNet":
            network = with_weight(models.unet, "out.2.bias", nan)
            return replace(models, denoiser=replace(models.denoiser, network=network))
        case "the text encoder":
            text = with_weight(models.text[0], "text_model.final_layer_norm.bias", nan)
            return replace(models, text=(text,))
        case _:
            return replace(models, vae=with_weight(models.vae, "decoder.conv_out.bias", nan))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("part", ["the UNet", "the text encoder", "the autoencoder (VAE)"])
def test_the_part_that_failed_is_named_in_every_path(path: str, part: str):
    with pytest.raises(LdmError) as error:
        PATHS[path](poisoned(part))
    assert str(error.value).startswith(f"{part} gave NaN or infinity, so there is no picture")
    assert len(str(error.value)) <= 200


def test_a_picture_that_cannot_be_encoded_is_named():
    models = tiny("sd1")
    assert models.vae is not None
    blind = replace(models, vae=with_weight(models.vae, "encoder.conv_out.bias", nan))
    with pytest.raises(LdmError, match="autoencoder"):
        PATHS["img2img"](blind)
    with pytest.raises(LdmError, match="autoencoder"):
        PATHS["hires, pixels"](blind)
    for name in ("sd1-inpaint", "pix2pix"):
        models = tiny(name)
        assert models.vae is not None
        blind = replace(models, vae=with_weight(models.vae, "encoder.conv_out.bias", nan))
        with pytest.raises(LdmError, match="autoencoder"):
            PATHS["inpaint" if name == "sd1-inpaint" else "img2img"](blind)


def too_strong_for_half(name: str = "sd1") -> Models:
    """A model whose weights fit into float16 while what its UNet computes does not."""
    models = tiny(name)
    network = with_weight(models.unet, "input_blocks.0.0.weight", lambda w: w * (30_000 / w.abs().max()))
    text = tuple(copy.deepcopy(encoder).half() for encoder in models.text)
    return replace(
        models, denoiser=replace(models.denoiser, network=network.half(), dtype=torch.float16), text=text
    )


def in_float32(models: Models) -> Models:
    network = copy.deepcopy(models.unet).float()
    text = tuple(copy.deepcopy(encoder).float() for encoder in models.text)
    return replace(models, denoiser=replace(models.denoiser, network=network, dtype=torch.float32), text=text)


@pytest.mark.parametrize("path", PATHS)
def test_a_unet_that_overflows_in_float16_draws_in_float32(path: str, caplog: pytest.LogCaptureFixture):
    half = too_strong_for_half()
    weights = {name: (w.data_ptr(), w.dtype, w._version) for name, w in half.unet.named_parameters()}
    with caplog.at_level(logging.WARNING):
        [drawn] = PATHS[path](half)
    assert "the UNet gave NaN or infinity in half precision; the run is repeated in float32" in caplog.text
    [expected] = PATHS[path](in_float32(half))
    assert drawn.tobytes() == expected.tobytes()
    after = {name: (w.data_ptr(), w.dtype, w._version) for name, w in half.unet.named_parameters()}
    assert after == weights  # the very same tensors as before


def test_what_computes_in_float32_is_not_repeated_though_it_is_held_in_half(caplog: pytest.LogCaptureFixture):
    with pytest.raises(LdmError, match="the UNet gave NaN"):
        ldm.txt2img(stored(poisoned("the UNet"), torch.float16), REQUEST)
    assert not caplog.records


def test_a_vae_that_overflows_in_half_precision_decodes_in_float32(caplog: pytest.LogCaptureFixture):
    models = tiny("sd1")
    assert models.vae is not None
    vae = with_weight(models.vae, "decoder.conv_in.weight", lambda w: w * (30_000 / w.abs().max())).half()
    with caplog.at_level(logging.WARNING):
        [drawn] = ldm.txt2img(replace(models, vae=vae), REQUEST)
    assert "the autoencoder (VAE) gave NaN or infinity in half precision" in caplog.text
    [expected] = ldm.txt2img(replace(models, vae=copy.deepcopy(vae).float()), REQUEST)
    assert drawn.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["ldsr", "x4-upscaler"])
def test_upscalers_that_draw_are_repeated_or_named(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latent, "SMALLEST", 16)
    monkeypatch.setattr(latent, "MULTIPLE", 16)
    kind = LDSR if name == "ldsr" else X4Upscaler
    half = too_strong_for_half(name)
    drawn = kind(half, steps=1)(PICTURE)
    assert drawn.tobytes() == kind(in_float32(half), steps=1)(PICTURE).tobytes()
    models = tiny(name)
    assert models.vae is not None
    with pytest.raises(LdmError, match="autoencoder"):
        kind(replace(models, vae=with_weight(models.vae, "decoder.conv_out.bias", nan)), steps=1)(PICTURE)
    network = with_weight(models.unet, "out.2.bias", nan)
    with pytest.raises(LdmError, match="UNet"):
        kind(replace(models, denoiser=replace(models.denoiser, network=network)), steps=1)(PICTURE)


@pytest.mark.parametrize("sampler", [sampler.name for sampler in SAMPLERS.values()])
def test_no_sampler_hangs_or_hides_it(sampler: str):
    models = tiny("class-f8")
    network = with_weight(models.unet, "out.2.bias", nan)
    poisoned = replace(models, denoiser=replace(models.denoiser, network=network))
    request = replace(REQUEST, prompt="7", sampler=sampler, steps=4)
    with pytest.raises(LdmError, match=r"the (UNet|network) gave NaN"):
        ldm.txt2img(poisoned, request)


def test_nothing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "model.safetensors"
    models = tiny("class-f8")
    assert models.vae is not None
    # Each weight is finite, so that the file loads; their products are not.
    vae = with_weight(models.vae, "decoder.conv_in.weight", lambda w: w * 1e38)
    vae = with_weight(vae, "post_quant_conv.weight", lambda w: w * 1e38)
    replace(models, vae=vae).save(path)
    words = ["7", "--ckpt", str(path), "--width", "16", "--height", "16", "--steps", "1", "--out"]
    assert txt2img([*words, str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "txt2img: the autoencoder (VAE) gave NaN or infinity" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
