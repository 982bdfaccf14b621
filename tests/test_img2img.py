"""Image to image: how many steps run from where, on pictures of every kind and size, with every sampler."""

import json
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ldm.canvas import fitted
from ldm.compat import Compatibility, profile
from ldm.conditioning import conditioning, further_channels
from ldm.controlnet import Control, ControlNet, ControlNetConfig
from ldm.denoise import Denoiser
from ldm.edit import Edit, Hires, ResizeMode
from ldm.errors import RequestError
from ldm.inputs import NO_INPUTS, Inputs
from ldm.latents import encode
from ldm.models import Models
from ldm.noise import BrownianNoise, starting_noise
from ldm.pipeline import img2img, plan, sample, start, txt2img
from ldm.request import Request
from ldm.resize import resized
from ldm.samplers import SAMPLERS, Step
from tests.golden import golden
from tests.tiny_families import tiny

PARTS = json.loads(golden("schedules/schedules.json").read_text())["img2img_steps"]
SMALL = Request(
    prompt="a red apple", width=32, height=24, steps=4, seed=7, cfg_scale=1.0, edit=Edit(strength=0.5)
)


def picture(width: int = 32, height: int = 24, channels: int = 3) -> Image.Image:
    """Noise, so that no part looks like another."""
    levels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(levels)


def steps(models: Models, request: Request, inputs: Inputs) -> list[Step]:
    return list(sample(models, request, inputs))


def last(models: Models, request: Request, inputs: Inputs) -> Tensor:
    return deque[Step](sample(models, request, inputs), maxlen=1).pop().x


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def precise() -> Models:
    """The embedded family with networks in float64, so that their rounding does not show in float32."""
    models = tiny("embedded")
    unet, text = (deepcopy(module).double() for module in (models.unet, models.text[0]))
    denoiser = Denoiser(unet, models.denoiser.schedule, models.denoiser.prediction, torch.float64)
    return replace(models, denoiser=denoiser, text=(text,))


# --- how many steps, and from which level


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_levels_visited_are_the_last_ones_of_the_web_ui(name: str):
    for case in PARTS:
        if not case.get("denoising_strength") or "steps" not in case:  # the others: see test_hires.py
            continue
        request = replace(
            SMALL,
            sampler=name,
            steps=case["steps"],
            edit=Edit(strength=case["denoising_strength"]),
            compat=Compatibility(strength="exact" if case["img2img_fix_steps"] else "webui"),
        )
        run = plan(tiny("sd1"), request, Inputs(picture()))
        assert len(run.levels) == case["total_steps"] + 1
        assert run.sigmas == run.levels[case["total_steps"] - case["t_enc"] - 1 :]
        assert run.steps_made == case["t_enc"] + 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_makes_the_steps_of_its_plan(name: str):
    request = replace(SMALL, sampler=name, steps=12)
    run = plan(tiny("embedded"), request, Inputs(picture()))
    assert run.steps_made == 7
    done = steps(tiny("embedded"), request, Inputs(picture()))
    assert done[0].sigma == run.sigmas[0]
    assert done[-1].x.isfinite().all()
    if name == "DPM fast":  # steps of 3, 3 and 1 evaluation of the network
        assert len(done) == 3
    elif name != "DPM adaptive":  # as the error allows
        assert [step.sigma for step in done] == list(run.sigmas[:-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_hardly_any_strength_gives_back_the_picture(name: str):
    request = replace(SMALL, sampler=name, steps=50, edit=Edit(strength=0.001))
    done = steps(tiny("embedded"), request, Inputs(picture()))
    z = encode(tiny("embedded"), [picture()])
    sigma = done[0].sigma
    assert sigma < 0.4  # UniPC's lowest level; of most it is 0.03
    # A step takes sigma * (noise - what the network holds for noise) away, both of order 1.
    assert (done[-1].x - z).abs().max() < 8 * sigma


TIMES = {  # of 20 steps at strength 0.75: the training steps visited, and that of the noise at the start
    "compvis": ([*range(701, 0, -50), 0], 751),
    "a1111": ([*range(701, 0, -50)], 751),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("sampler", ["DDIM", "PLMS"])
def test_old_ddim_starts_where_compvis_and_the_web_ui_start_it(sampler: str, name: str):
    edit = Edit(strength=0.75)
    request = replace(SMALL, sampler=sampler, steps=20, edit=edit, compat=profile(name))
    run = plan(tiny("sd1"), request, Inputs(picture()))
    levels = tiny("sd1").denoiser.schedule.sigmas
    times, noised = TIMES[name]
    assert run.sigmas == pytest.approx([levels[t] for t in times])
    assert run.noised == levels[noised]

    # Both compute the start in the variance-preserving scale, with the abar of `noised`.
    z, abar = encode(tiny("sd1"), [picture()]), tiny("sd1").denoiser.schedule.alphas_cumprod[noised]
    first, _ = starting_noise(request, run.latent_shape, factor=8)
    expected = abar**0.5 * z + (1 - abar) ** 0.5 * first
    found = start(tiny("sd1"), run, z)[0] / (1 + run.sigmas[0] ** 2) ** 0.5
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


def test_that_start_is_the_originals():
    toy = load_file(golden("samplers/toy.safetensors"))
    encoded = load_file(golden("samplers/compvis_ddim_plms.safetensors"))[
        "ddim_img2img/S20/strength=0.75/encoded"
    ]
    abar = tiny("sd1").denoiser.schedule.alphas_cumprod[751]
    expected = abar**0.5 * toy["x0_img2img"] + (1 - abar) ** 0.5 * toy["x_init_unit"]
    torch.testing.assert_close(encoded, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["compvis", "a1111"])
def test_old_ddim_makes_a_step_at_any_strength_and_all_of_them_without_a_picture(name: str):
    for strength in (0.001, 0.1, 1.0):
        edit = Edit(strength=strength)
        request = replace(SMALL, sampler="DDIM", steps=15, edit=edit, compat=profile(name))
        done = steps(tiny("sd1"), request, Inputs(picture()))
        assert 1 <= len(done) <= 15
    # 15 does not divide 1000, so the originals visit 16 training steps.
    alone = plan(tiny("sd1"), replace(request, edit=None))
    assert alone.sigmas == alone.levels
    assert alone.sigmas[0] == tiny("sd1").denoiser.schedule.sigmas[991]


def test_the_web_uis_ddim_cannot_make_a_single_step():
    request = replace(SMALL, sampler="DDIM", steps=1, compat=profile("a1111"))
    with pytest.raises(RequestError, match="DDIM of the web UI makes a step less than asked for; ask for 2"):
        plan(tiny("sd1"), request, Inputs(picture()))


def test_a_family_has_its_own_strength():
    assert plan(tiny("sd1"), replace(SMALL, edit=None), Inputs(picture())).strength == 0.75
    run = plan(tiny("pix2pix"), replace(SMALL, edit=None), Inputs(picture()))
    assert (run.strength, run.steps_made) == (1.0, 4)


def test_prompts_change_in_the_middle_of_the_steps_that_are_made():
    request = replace(SMALL, prompt="[cat:dog:0.5]", steps=10, edit=Edit(strength=0.3))
    guides = conditioning(tiny("sd1"), plan(tiny("sd1"), request, Inputs(picture())))
    assert [guide is guides[0] for guide in guides] == [True, True, False, False]


# --- against a computation by hand


def by_hand(models: Models, request: Request, z: Tensor, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler's method, written once more."""
    [positive] = conditioning(models, plan(models, request, Inputs(picture())))[0].positive
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):
            denoised = models.denoiser(x, sigma, positive[0])
            x = x + (sigma_next - sigma) * (x - denoised) / sigma
    return x


def test_a_run_starts_from_the_picture_and_the_first_draw_of_the_seed():
    edit = Edit(strength=0.5, noise_multiplier=0.8, extra_noise=0.1)
    request = replace(SMALL, sampler="Euler", edit=edit)
    z = encode(tiny("sd1"), [picture()])
    sigmas = plan(tiny("sd1"), replace(SMALL, sampler="Euler", edit=None)).sigmas[1:]  # 3 of 4
    noise = torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(7))
    start = z + 0.8 * (sigmas[0] + 0.1) * noise
    expected = by_hand(tiny("sd1"), request, z, start, sigmas)
    found = last(tiny("sd1"), request, Inputs(picture()))
    # Terms in another order: some digits of float32, of values up to 30.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_brownian_noise_is_that_of_the_whole_schedule():
    """As in the web UI: a run of a part of the levels sees a part of the path."""
    run = plan(tiny("sd1"), replace(SMALL, sampler="DPM++ SDE", steps=20), Inputs(picture()))
    _, noise, _ = start(tiny("sd1"), run, encode(tiny("sd1"), [picture()]))
    whole = BrownianNoise(run.latent_shape, [7], sigma_min=run.levels[-2], sigma_max=run.levels[0])
    assert run.sigmas[0] < run.levels[0]
    assert torch.equal(noise(*run.sigmas[:2]), whole(*run.sigmas[:2]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(name: str, precise: Models):
    """Nor on the prompt's changes: DPM adaptive draws the pictures of a batch one after the other."""
    request = replace(SMALL, prompt="[cat:dog:0.5]", sampler=name)
    batch = last(precise, replace(request, batch_size=2), Inputs(picture()))
    singles = [last(precise, replace(request, seed=seed), Inputs(picture())) for seed in (7, 8)]
    assert torch.equal(batch, torch.cat(singles))


# --- pictures of all kinds and sizes


@pytest.mark.parametrize(
    ("size", "usual", "worked_on"),
    [
        ((101, 77), 64, (104, 80)),
        ((512, 512), 512, (512, 512)),
        ((1024, 768), 512, (1024, 768)),
        ((4000, 3000), 512, (592, 440)),  # too large: about 512 x 512 pixels, in its shape
        ((64, 32), 512, (728, 360)),  # too small
        ((9000, 8), 512, (9000, 8)),
        ((1, 1), 64, (64, 64)),
    ],
)
def test_pictures_are_worked_on_in_about_their_own_size(
    size: tuple[int, int], usual: int, worked_on: tuple[int, int]
):
    assert fitted(Image.new("RGB", size), usual, 8) == worked_on
    run = plan(tiny("sd1"), replace(SMALL, width=None, height=None), Inputs(Image.new("RGB", size)))
    assert (run.width, run.height) == fitted(Image.new("RGB", size), 512, 8)


def test_a_picture_of_an_odd_size_is_drawn_in_the_next_one_that_fits():
    request = replace(SMALL, steps=1, width=None, height=None)
    [image] = img2img(tiny("embedded"), request, picture(101, 77))  # 4 pixels per latent pixel
    assert image.size == (100, 76)


def test_of_one_side_the_other_follows_by_the_shape():
    def size(**sides: int) -> tuple[int, int]:
        run = plan(
            tiny("sd1"), replace(SMALL, **{"width": None, "height": None, **sides}), Inputs(picture(96, 40))
        )
        return run.width, run.height

    assert size(width=192) == (192, 80)
    assert size(height=32) == (80, 32)  # of 77
    assert size(width=8) == (8, 8)
    with pytest.raises(RequestError, match="width must be a multiple of 8, got 100; try 96"):
        size(width=100)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "embedded", "class-f4", "unconditional"])
def test_every_family_draws_from_a_picture(name: str):
    prompt = "207" if name == "class-f4" else "a cat"
    request = replace(SMALL, prompt=prompt, width=48, height=40)
    [image] = img2img(tiny(name), request, picture(101, 77))
    assert (image.size, image.mode) == ((48, 40), "RGB")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_drawn_from(mode: str):
    image = picture().convert("L").convert(mode) if mode in ("LA", "I;16") else picture().convert(mode)
    [drawn] = img2img(tiny("embedded"), SMALL, image)
    assert (drawn.size, drawn.mode) == ((32, 24), "RGB")


def test_what_is_transparent_is_white():
    glass = picture(channels=4)
    white = Image.alpha_composite(Image.new("RGBA", glass.size, "white"), glass).convert("RGB")
    request = SMALL
    one, other = (img2img(tiny("embedded"), request, image)[0] for image in (glass, white))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("mode", ["resize", "crop", "fill"])
def test_pictures_of_another_shape_are_made_to_fit(mode: ResizeMode):
    wide, request = picture(96, 40), replace(SMALL, width=48, height=40)
    assert mode != "latent"
    stretched = img2img(tiny("sd1"), replace(request, edit=Edit(strength=0.5, resize=mode)), wide)
    ready = img2img(tiny("sd1"), request, resized(wide, 48, 40, mode))
    assert stretched[0].tobytes() == ready[0].tobytes()


@pytest.mark.parametrize("name", ["sd1", "pix2pix"])
def test_pictures_may_be_made_to_fit_as_latents(name: str):
    request = replace(SMALL, sampler="Euler", width=48, height=40, edit=Edit(strength=0.5, resize="latent"))
    wide = picture(101, 77)
    z = F.interpolate(encode(tiny(name), [resized(wide, 104, 80)]), size=(5, 6), mode="bilinear")
    step = steps(tiny(name), request, Inputs(wide))[0]
    start = step.denoised + (step.x - step.denoised) * step.sigma / step.sigma_next
    noise = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(start - step.sigma * noise, z, atol=1e-4, rtol=0)


def test_colours_are_brought_back_on_request():
    grey = Image.new("RGB", (32, 24), "gray")
    request = SMALL
    corrected = replace(request, edit=Edit(strength=0.5, color_correction=True))
    [plain], [matched] = (img2img(tiny("sd1"), one, grey) for one in (request, corrected))
    assert np.ptp(pixels(plain), axis=2).max() > 5
    assert np.ptp(pixels(matched), axis=2).max() <= 1


# --- pictures beside the noisy latent


def test_a_depth_picture_is_cut_like_its_picture():
    request = replace(SMALL, width=32, height=32, edit=Edit(resize="crop"))
    depth = Image.linear_gradient("L").resize((96, 32))  # dark at the top
    depth.paste(0, (0, 0, 32, 32))  # what is cut off
    run = plan(tiny("sd2-depth"), request, Inputs(picture(96, 32), depth=depth))
    seen = further_channels(tiny("sd2-depth"), run)
    assert seen is not None
    # Of the middle third, the rows rise evenly from far to near; bicubic interpolation is exact on a ramp.
    torch.testing.assert_close(seen[0, 0, :, 1], torch.linspace(-1, 1, 4), atol=0.05, rtol=0)
    assert (seen.std(dim=3) < 0.01).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "F"])
def test_depth_may_be_of_any_depth_and_scale(mode: str):
    models, ramp = tiny("sd2-depth"), np.linspace(20, 200, 24).astype(np.uint8)[:, None].repeat(32, 1)
    plain = Image.fromarray(ramp)
    deep = {"I;16": ramp.astype(np.uint16) * 257, "F": ramp.astype(np.float32) / 9}.get(mode)
    image = plain.convert(mode) if deep is None else Image.fromarray(deep)
    assert image.mode == mode
    one, other = (
        further_channels(models, plan(models, SMALL, Inputs(picture(), depth=depth)))
        for depth in (plain, image)
    )
    assert one is not None
    assert other is not None
    assert (one.min(), one.max()) == (-1, 1)
    torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


def controlnet(models: Models) -> ControlNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ControlNet(ControlNetConfig(unet=models.unet.config)).requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def test_a_hint_of_the_picture_is_cut_like_it():
    models, wide = tiny("sd1"), picture(96, 40)
    network = controlnet(models)
    request = replace(SMALL, width=48, height=40)  # stretched, where a hint by itself would be cropped
    found = last(models, request, Inputs(wide, controls=(Control(network, wide),)))
    small = wide.resize((48, 40), Image.Resampling.LANCZOS)
    expected = last(models, request, Inputs(small, controls=(Control(network, small),)))
    assert torch.equal(found, expected)


# --- textures


def test_a_texture_has_no_edge():
    """A picture moved around the torus, with its hint, gives the moved result. (Noise would not move.)"""
    models = tiny("sd1")
    network = controlnet(models)
    request = replace(SMALL, sampler="Euler", tiling=True, edit=Edit(strength=0.5, noise_multiplier=0.0))

    def drawn(move: int, request: Request) -> np.ndarray:
        moved = Image.fromarray(np.roll(np.asarray(picture(64, 48)), (move, 2 * move), (0, 1)))
        request = replace(request, width=64, height=48)
        [image] = txt2img(models, request, Inputs(moved, controls=(Control(network, moved),)))
        return pixels(image)

    def difference(request: Request) -> int:
        return np.abs(drawn(16, request) - np.roll(drawn(0, request), (16, 32), (0, 1))).max()

    assert difference(request) <= 1  # a level, from the last digits of float32
    assert difference(replace(request, tiling=False)) > 3


# --- mistakes


def test_mistakes_are_told_in_a_sentence():
    with pytest.raises(RequestError, match="there is none"):
        txt2img(tiny("sd1"), SMALL, NO_INPUTS)
    with pytest.raises(RequestError, match="a mask needs the picture"):
        Inputs(mask=Image.new("L", (8, 8)))
    with pytest.raises(RequestError, match="takes no depth picture"):
        txt2img(tiny("sd1"), replace(SMALL, edit=None), Inputs(depth=picture()))
    with pytest.raises(RequestError, match="needs a depth picture"):
        img2img(tiny("sd2-depth"), SMALL, picture())
    with pytest.raises(RequestError, match="a second pass follows a run from noise"):
        img2img(tiny("sd1"), Request(hires=Hires()), picture())
    for strength in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(RequestError, match="strength must be above 0 and at most 1"):
            Edit(strength=strength)
    with pytest.raises(RequestError, match="resize must be one of resize, crop, fill, latent"):
        Edit(resize="stretch")  # pyright: ignore[reportArgumentType]
