"""Inpainting: what is drawn anew, and that all else stays as it was, to the byte."""

from collections import deque
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import masks
from ldm.conditioning import conditioning, further_channels
from ldm.denoise import Denoiser
from ldm.edit import Content, Edit
from ldm.errors import RequestError
from ldm.inputs import Inputs
from ldm.latents import encode
from ldm.models import Models
from ldm.pipeline import inpaint, plan, sample
from ldm.request import Request
from ldm.resize import resized
from ldm.samplers import SAMPLERS, Step
from ldm.soft_inpainting import Soft, blended
from tests.tiny_families import tiny

EDIT = Edit(strength=0.5, mask_blur=0)
SMALL = Request(prompt="a red apple", width=48, height=40, steps=4, seed=7, cfg_scale=1.0, edit=EDIT)


def noise(width: int = 48, height: int = 40, channels: int = 3) -> Image.Image:
    """Noise, so that no part looks like another."""
    levels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(levels)


def box(size: tuple[int, int] = (48, 40), sides: tuple[int, int, int, int] = (16, 8, 40, 32)) -> Image.Image:
    """A mask; the box lies on whole latent pixels."""
    return masks.from_box(sides, size)


def last(models: Models, request: Request, inputs: Inputs) -> Tensor:
    return deque[Step](sample(models, request, inputs), maxlen=1).pop().x


def changed(a: Image.Image, b: Image.Image) -> np.ndarray:
    """Where two pictures differ, (H, W)."""
    assert (a.size, a.mode) == (b.size, b.mode)
    return (np.asarray(a) != np.asarray(b)).reshape(a.height, a.width, -1).any(axis=2)


# --- the picture outside the mask

WAYS: dict[str, dict[str, Any]] = {
    "whole, in its own size": {"width": None, "height": None},
    "only masked": {"edit": replace(EDIT, only_masked=True, padding=4)},
    "only masked, in the usual size": {
        "width": None,
        "height": None,
        "edit": replace(EDIT, only_masked=True, padding=4),
    },
    "whole, drawn in another size and kept": {"edit": replace(EDIT, keep_size=True)},
    "soft": {"width": None, "height": None, "edit": replace(EDIT, soft=Soft(), mask_blur=4)},
    "soft, only masked": {"edit": replace(EDIT, soft=Soft(), mask_blur=4, only_masked=True)},
    "a texture": {"width": None, "height": None, "tiling": True},
    "with the picture's colours": {"edit": replace(EDIT, color_correction=True, only_masked=True)},
}


@pytest.mark.parametrize("invert", [False, True], ids=["", "inverted"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels", [3, 4], ids=["RGB", "RGBA"])
def test_what_is_not_masked_stays_to_the_byte(way: str, channels: int, invert: bool):
    changes = {"edit": EDIT, "steps": 2, "batch_size": 2, **WAYS[way]}
    edit = replace(changes.pop("edit"), mask_invert=invert)
    request = replace(SMALL, edit=edit, **changes)
    picture, mask = noise(101, 77, channels), box((101, 77), (30, 20, 60, 50))
    kept = np.asarray(masks.prepared(mask, mask.size, invert=invert, blur=edit.mask_blur)) == 0
    for result in inpaint(tiny("embedded"), request, picture, mask):
        if result.mode == "RGB" and channels == 4:  # all that was transparent is drawn over
            result.putalpha(255)
        differs = changed(result, picture)
        assert not differs[kept].any()
        assert differs[~kept].mean() > (0.3 if edit.soft else 0.98)


@pytest.mark.parametrize("mode", ["resize", "crop", "fill"])
def test_a_named_size_is_that_of_the_result(mode: Any):
    picture, mask = noise(101, 77), box((101, 77), (30, 20, 60, 50))
    request = replace(SMALL, edit=replace(EDIT, resize=mode))
    [result] = inpaint(tiny("embedded"), request, picture, mask)
    assert result.size == (48, 40)
    kept = np.asarray(resized(mask, 48, 40, mode)) == 0
    assert not changed(result, resized(picture, 48, 40, mode))[kept].any()


def test_a_blurred_edge_reaches_outwards_only():
    edge = replace(EDIT, mask_blur=2)  # 5 pixels
    [result] = inpaint(tiny("sd1"), replace(SMALL, edit=edge), noise(), box())
    differs = changed(result, noise())
    assert differs[8:32, 16:40].mean() > 0.98
    ring = differs.copy()
    ring[8:32, 16:40] = False
    assert ring.any()
    assert not ring[:, :11].any()


def test_all_white_draws_everything_anew():
    mask = Image.new("L", (48, 40), 255)
    x = last(tiny("sd1"), SMALL, Inputs(noise(), mask))
    assert torch.equal(x, last(tiny("sd1"), SMALL, Inputs(noise())))


# --- the latents, against a computation by hand


def by_hand(models: Models, request: Request, x: Tensor, keep: Any) -> Tensor:
    """Euler's method over the last 3 of 4 levels, written once more."""
    sigmas = plan(models, request, Inputs(noise(), box())).sigmas
    assert len(sigmas) == 4
    [positive] = conditioning(models, plan(models, request, Inputs(noise(), box())))[0].positive
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):
            denoised = keep(models.denoiser(x, sigma, positive[0]), sigma)
            x = x + (sigma_next - sigma) * (x - denoised) / sigma
    return keep(x, 0.0)


@pytest.mark.parametrize("content", get_args(Content))
def test_masked_content_decides_the_start_and_the_picture_comes_back_at_every_step(content: Content):
    models = tiny("sd1")
    request = replace(SMALL, sampler="Euler", edit=replace(EDIT, masked_content=content))
    mask = torch.zeros(1, 1, 5, 6)
    mask[..., 1:4, 2:5] = 1
    draw = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(7))
    image = masks.filled(noise(), box()) if content != "original" else noise()
    z = encode(models, [image])
    if content == "latent noise":
        z = torch.where(mask == 1, draw, z)
    elif content == "latent nothing":
        z = torch.where(mask == 1, 0.0, z)
    sigma = plan(models, request, Inputs(noise(), box())).sigmas[0]

    def keep(x: Tensor, sigma: float) -> Tensor:
        return torch.where(mask == 1, x, z)

    expected = by_hand(models, request, z + sigma * draw, keep)
    found = last(models, request, Inputs(noise(), box()))
    # Terms in another order: some digits of float32, of values up to 30.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_soft_inpainting_pulls_by_the_grey_of_the_mask():
    models, mask_image = tiny("sd1"), Image.linear_gradient("L").resize((48, 40))
    edit = replace(EDIT, soft=Soft(preservation=2.0))
    request = replace(SMALL, sampler="Euler", edit=edit)
    z, mask = encode(models, [noise()]), masks.latent_mask(mask_image, 6, 5, rounded=False)
    draw = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(7))
    sigma = plan(models, request, Inputs(noise(), mask_image)).sigmas[0]
    start = z + sigma * draw
    expected = by_hand(models, request, start, lambda x, s: blended(Soft(preservation=2.0), z, x, mask, s))
    found = last(models, request, Inputs(noise(), mask_image))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def precise() -> Models:
    """The embedded family with networks in float64, so that their rounding does not show in float32."""
    models = tiny("embedded")
    unet, text = (deepcopy(module).double() for module in (models.unet, models.text[0]))
    denoiser = Denoiser(unet, models.denoiser.schedule, models.denoiser.prediction, torch.float64)
    return replace(models, denoiser=denoiser, text=(text,))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_what_is_not_masked(name: str, precise: Models):
    request = replace(SMALL, width=24, height=24, sampler=name, batch_size=2)
    inputs = Inputs(noise(24, 24), box((24, 24), (8, 8, 20, 20)))
    x, z = last(precise, request, inputs), encode(precise, [noise(24, 24)])
    assert x.isfinite().all()
    kept = torch.ones(6, 6, dtype=torch.bool)
    kept[2:5, 2:5] = False
    assert torch.equal(x[..., kept], z.expand(2, -1, -1, -1)[..., kept])
    assert (x - z)[..., ~kept].abs().min() > 0
    single = last(precise, replace(request, batch_size=1, seed=8), inputs)
    assert torch.equal(x[1:], single)


# --- inpainting models


@pytest.mark.parametrize("name", ["sd1-inpaint", "sd2-inpaint"])
@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_inpainting_models_see_the_mask_and_what_it_leaves(name: str, weight: float):
    models = tiny(name)
    edit = replace(EDIT, mask_weight=weight)
    seen = further_channels(models, plan(models, replace(SMALL, edit=edit), Inputs(noise(), box())))
    assert seen is not None
    mask = torch.zeros(1, 1, 5, 6)
    mask[..., 1:4, 2:5] = 1
    assert torch.equal(seen[:, :1], mask)
    levels = torch.from_numpy(np.asarray(noise(), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    levels[..., 8:32, 16:40] *= 1 - weight  # towards grey
    assert models.vae is not None
    with torch.no_grad():
        torch.testing.assert_close(seen[:, 1:], models.vae.encode(levels), atol=1e-6, rtol=0)


def test_they_inpaint_in_every_way():
    request = replace(SMALL, edit=replace(EDIT, only_masked=True, soft=Soft(), mask_blur=2))
    [result] = inpaint(tiny("sd1-inpaint"), request, noise(101, 77), box((101, 77), (30, 20, 60, 50)))
    assert result.size == (101, 77)


def test_instruct_pix2pix_keeps_what_is_not_masked():
    request = replace(SMALL, edit=replace(EDIT, strength=1.0), cfg_scale=2.0)
    inputs = Inputs(noise(), box())
    x, z = last(tiny("pix2pix"), request, inputs), encode(tiny("pix2pix"), [noise()])
    assert torch.equal(x[..., 0, :], z[..., 0, :])
    [result] = inpaint(tiny("pix2pix"), request, noise(), box())
    assert not changed(result, noise())[np.asarray(box()) == 0].any()


def test_depth_is_cut_to_the_part_that_is_drawn():
    request = replace(SMALL, width=32, height=32, edit=replace(EDIT, only_masked=True, padding=0))
    depth = Image.new("L", (96, 64))
    depth.paste(Image.linear_gradient("L").resize((32, 32)), (48, 16))
    inputs = Inputs(noise(96, 64), box((96, 64), (48, 16, 80, 48)), depth)
    seen = further_channels(tiny("sd2-depth"), plan(tiny("sd2-depth"), request, inputs))
    assert seen is not None
    # A ramp from far to near; bicubic interpolation is exact on it but at the ends.
    torch.testing.assert_close(seen[0, 0, :, 1], torch.linspace(-1, 1, 4), atol=0.05, rtol=0)


# --- masks


def test_masks_may_be_larger_or_painted_on_glass():
    twice = box((96, 80), (32, 16, 80, 64))
    glass = Image.new("RGBA", (48, 40), (0, 0, 0, 0))
    glass.paste((0, 0, 0, 255), (16, 8, 40, 32))
    results = [inpaint(tiny("sd1"), SMALL, noise(), mask)[0] for mask in (box(), twice, glass)]
    first = results[0].tobytes()
    assert results[2].tobytes() == first
    assert (changed(results[1], results[0])[9:31, 17:39] == 0).all()  # but for the edge of the scaled mask


def test_mistakes_are_told_in_a_sentence():
    models = tiny("sd1")
    with pytest.raises(RequestError, match="the mask is empty"):
        inpaint(models, SMALL, noise(), Image.new("L", (48, 40)))
    white = Image.new("L", (48, 40), 255)
    with pytest.raises(RequestError, match="the mask is empty"):
        inpaint(models, replace(SMALL, edit=replace(EDIT, mask_invert=True)), noise(), white)
    with pytest.raises(RequestError, match="the mask is 40x48, the picture 48x40; their shapes must match"):
        inpaint(models, SMALL, noise(), Image.new("L", (40, 48), 255))
    with pytest.raises(RequestError, match="masked_content must be one of fill, original, latent noise"):
        Edit(masked_content="blur")  # pyright: ignore[reportArgumentType]
    for field, value in (("mask_blur", -1), ("padding", -1), ("mask_weight", 1.5), ("noise_multiplier", -1)):
        with pytest.raises(RequestError, match=field):
            replace(EDIT, **{field: value})
