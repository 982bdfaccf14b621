"""The second pass ("hires fix"): its size, its start, its steps, and its own settings."""

import json
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.conditioning import conditioning
from ldm.denoise import Denoiser
from ldm.edit import Hires
from ldm.errors import LdmError, RequestError
from ldm.hires import LATENT_MODES
from ldm.images import to_pil
from ldm.latents import decode, encode
from ldm.library import Library
from ldm.models import Models
from ldm.pipeline import finished, plan, sample, txt2img
from ldm.request import Request
from ldm.samplers import SAMPLERS, Step
from ldm.upscalers import EMBEDDED
from tests.golden import golden
from tests.tiny_families import tiny

PARTS = json.loads(golden("schedules/schedules.json").read_text())["img2img_steps"]
SMALL = Request(
    prompt="a cat",
    width=32,
    height=24,
    steps=3,
    seed=7,
    cfg_scale=1.0,
    sampler="Euler",
    hires=Hires(steps=2, strength=0.5),
)


def with_hires(**changes: Any) -> Request:
    assert SMALL.hires is not None
    return replace(SMALL, hires=replace(SMALL.hires, **changes))


def passes(models: Models, request: Request) -> tuple[list[Step], list[Step]]:
    """The steps of both, told apart by their size."""
    steps = list(sample(models, request))
    first = [step for step in steps if step.x.shape == steps[0].x.shape]
    return first, steps[len(first) :]


def last(models: Models, request: Request) -> Tensor:
    return deque[Step](sample(models, request), maxlen=1).pop().x


def start(step: Step) -> Tensor:
    """From which x Euler's method made a step."""
    return step.denoised + (step.x - step.denoised) * step.sigma / step.sigma_next


# --- the size

# By the web UI's code: whole parts of products, one side from the other in whole numbers, and what sticks out
# of a size that was named in full is cut off in steps of 8 pixels.
SIZES = {
    (64, 48, 2.0, None, None): (128, 96),
    (64, 48, 1.5, None, None): (96, 72),
    (512, 768, 1.1, None, None): (560, 840),  # 563 x 844
    (512, 512, 1.0, None, None): (512, 512),
    (64, 48, 2.0, 128, None): (128, 96),
    (64, 48, 2.0, None, 80): (104, 80),  # 106 wide
    (512, 768, 2.0, 640, None): (640, 960),
    (64, 48, 2.0, 128, 128): (128, 128),  # of 170 x 128
    (64, 48, 2.0, 160, 80): (160, 80),  # of 160 x 120
    (64, 48, 2.0, 128, 96): (128, 96),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_those_of_the_web_ui(case: tuple[Any, ...]):
    width, height, scale, to_width, to_height = case
    hires = Hires(scale=scale, width=to_width, height=to_height)
    run = plan(tiny("sd1"), replace(SMALL, width=width, height=height, hires=hires))
    assert run.second is not None
    assert (run.second.width, run.second.height) == SIZES[case]
    assert run.second.latent_shape == (4, SIZES[case][1] // 8, SIZES[case][0] // 8)


@pytest.mark.parametrize("upscaler", ["Latent (nearest)", "Nearest"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 40), (48, None), (None, 32)])
def test_a_named_size_is_covered_and_cut_to(upscaler: str, width: int | None, height: int | None):
    [image] = txt2img(tiny("sd1"), with_hires(width=width, height=height, upscaler=upscaler))
    assert image.size == (width or 32 * 32 // 24 // 8 * 8, height or 48 * 24 // 32 // 8 * 8)


def test_the_cut_is_in_the_middle():
    first, second = passes(tiny("sd1"), with_hires(width=64, height=80, upscaler="Latent (nearest)"))
    whole = F.interpolate(first[-1].x, size=(10, 13))  # 104 x 80
    noise = torch.randn(1, 4, 10, 8, generator=torch.Generator().manual_seed(7))
    found = start(second[0]) - second[0].sigma * noise
    torch.testing.assert_close(found, whole[..., 2:10], atol=1e-4, rtol=0)


# --- its start


@pytest.mark.parametrize("upscaler", LATENT_MODES)
def test_a_latent_is_enlarged_and_noised_anew_with_the_same_seeds(upscaler: str):
    request = replace(with_hires(upscaler=upscaler), batch_size=2)
    first, second = passes(tiny("sd1"), request)
    mode, antialias = LATENT_MODES[upscaler]
    larger = F.interpolate(first[-1].x, size=(6, 8), mode=mode, antialias=antialias)
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    noise = torch.stack([torch.randn(4, 6, 8, generator=seed) for seed in seeds])
    expected = larger + second[0].sigma * noise
    # From a step of Euler's method, solved for its start: some digits of float32 less.
    torch.testing.assert_close(start(second[0]), expected, atol=1e-4, rtol=0)


def lanczos(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS)


def test_a_picture_is_enlarged_and_encoded():
    first, second = passes(tiny("sd1"), with_hires(upscaler="Lanczos"))
    picture = lanczos(to_pil(decode(tiny("sd1"), first[-1].x)[0]), 64, 48)
    noise = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(7))
    expected = encode(tiny("sd1"), [picture]) + second[0].sigma * noise
    torch.testing.assert_close(start(second[0]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("upscaler", ["Latent", "Lanczos", "Nearest", "R-ESRGAN AnimeVideo"])
def test_strength_0_is_the_enlarged_picture(upscaler: str):
    request = with_hires(upscaler=upscaler, strength=0.0)
    run = plan(tiny("sd1"), request)
    assert (run.second, run.steps_made) == (None, 3)
    [image] = txt2img(tiny("sd1"), request)
    assert image.size == (64, 48)
    x = last(tiny("sd1"), replace(SMALL, hires=None))
    if upscaler == "Latent":
        larger = F.interpolate(x, size=(6, 8), mode="bilinear")
        assert image.tobytes() == to_pil(decode(tiny("sd1"), larger)[0]).tobytes()
    elif upscaler == "Lanczos":
        assert image.tobytes() == lanczos(to_pil(decode(tiny("sd1"), x)[0]), 64, 48).tobytes()


def test_the_upscaler_is_read_once_for_all_pictures_of_a_batch(tmp_path: Path):
    file = Path(copy(EMBEDDED["R-ESRGAN AnimeVideo"], tmp_path / "mine.safetensors"))
    models = replace(tiny("sd1"), library=Library(upscalers=tmp_path))
    run = plan(models, replace(with_hires(upscaler="mine", strength=0.0), batch_size=2))
    latents = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(0))

    def one_by_one() -> Iterator[tuple[int, Tensor]]:
        yield 0, latents[0]
        file.unlink()
        yield 1, latents[1]

    assert [image.size for image in finished(models, run, one_by_one())] == [(64, 48), (64, 48)]


# --- its steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_exactly_the_steps_asked_for_are_made(name: str):
    for case in PARTS:
        if "hires_pass_explicit_steps" in case:
            steps, total = case["hires_pass_explicit_steps"], case["total_steps"]
            hires = Hires(steps=steps, strength=case["denoising_strength"])
            second = plan(tiny("sd1"), replace(SMALL, sampler=name, hires=hires)).second
            assert second is not None
            assert (len(second.levels), second.steps_made) == (total + 1, steps)
            assert second.sigmas == second.levels[total - case["t_enc"] - 1 :]


@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
def test_its_steps_are_counted_on(strength: float):
    first, second = passes(tiny("sd1"), with_hires(strength=strength))
    assert [step.index for step in (*first, *second)] == [0, 1, 2, 3, 4]
    assert plan(tiny("sd1"), with_hires(strength=strength)).steps_made == 5
    assert [step.sigma_next for step in second] == [second[1].sigma, 0.0]
    first, second = passes(tiny("sd1"), with_hires(strength=strength, steps=None))
    assert len(second) == 3  # as many as the first pass


@pytest.mark.parametrize("name", ["DPM adaptive", "Restart", "DPM++ 3M SDE", "DDIM", "UniPC"])
def test_it_follows_any_sampler(name: str):
    first, second = passes(tiny("embedded"), replace(SMALL, sampler=name))
    assert [step.index for step in (*first, *second)] == [*range(len(first) + len(second))]
    assert second[-1].x.isfinite().all()


# --- its settings


def test_it_has_the_settings_of_the_first_pass_unless_it_has_its_own():
    run = plan(tiny("sd1"), replace(SMALL, sampler="DPM++ 2M", schedule="exponential", negative_prompt="dim"))
    second = run.second
    assert second is not None
    assert (second.prompt, second.negative_prompt) == ("a cat", "dim")
    assert (second.sampler.name, second.spacing, second.cfg_scale) == ("DPM++ 2M", "exponential", 1.0)
    own = {"prompt": "a dog", "negative_prompt": "dark", "sampler": "DPM++ 2M Karras", "cfg_scale": 3.0}
    second = plan(tiny("sd1"), replace(with_hires(**own), negative_prompt="dim")).second
    assert second is not None
    assert (second.prompt, second.negative_prompt) == ("a dog", "dark")
    assert (second.sampler.name, second.spacing, second.cfg_scale) == ("DPM++ 2M", "karras", 3.0)


def test_an_empty_prompt_is_that_of_the_first_pass_as_in_the_web_ui():
    request = replace(with_hires(prompt="", negative_prompt=""), negative_prompt="dim")
    second = plan(tiny("sd1"), request).second
    assert second is not None
    assert (second.prompt, second.negative_prompt) == ("a cat", "dim")


def texts(request: Request) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The contexts of each step of both passes."""
    run = plan(tiny("sd1"), request)
    assert run.second is not None
    first, second = (conditioning(tiny("sd1"), one) for one in (run, run.second))
    return ([g.positive[0][0].context for g in first], [g.positive[0][0].context for g in second])


@pytest.mark.parametrize(
    ("prompt", "cats"),
    [
        ("[cat:dog:0.5]", [1, 1, 0, 0, 0, 0, 0, 0]),
        ("[cat:dog:1.5]", [1, 1, 1, 1, 1, 1, 0, 0]),
        ("[cat:dog:5]", [1, 1, 1, 1, 1, 0, 0, 0]),  # the first step of the second pass
        ("[cat:dog:2]", [1, 1, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_prompt_may_change_within_it(prompt: str, cats: list[int]):
    [cat], _ = texts(replace(SMALL, prompt="cat", steps=1))
    first, second = texts(replace(with_hires(steps=4), prompt=prompt, steps=4))
    assert cat is not None
    found = [context is not None and torch.equal(context, cat) for context in (*first, *second)]
    assert found == [bool(one) for one in cats]


def test_it_is_image_to_image_by_hand():
    models = tiny("sd1")
    _, second = passes(models, with_hires(prompt="a dog", steps=3))
    run = plan(models, with_hires(prompt="a dog", steps=3)).second
    assert run is not None
    [(dog, _)] = conditioning(models, run)[0].positive
    x = start(second[0])
    with torch.no_grad():
        for sigma, sigma_next in pairwise(run.sigmas):
            x = x + (sigma_next - sigma) * (x - models.denoiser(x, sigma, dog)) / sigma
    torch.testing.assert_close(x, second[-1].x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("upscaler", ["Latent", "Nearest"])
def test_a_picture_does_not_depend_on_its_batch(upscaler: str):
    models = tiny("embedded")
    unet, text = (deepcopy(module).double() for module in (models.unet, models.text[0]))
    denoiser = Denoiser(unet, models.denoiser.schedule, models.denoiser.prediction, torch.float64)
    precise = replace(models, denoiser=denoiser, text=(text,))
    request = replace(with_hires(upscaler=upscaler), sampler="Euler a", cfg_scale=3.0)
    batch = last(precise, replace(request, batch_size=2))
    singles = [last(precise, replace(request, seed=seed)) for seed in (7, 8)]
    assert torch.equal(batch, torch.cat(singles))


@pytest.mark.parametrize("name", ["sd2", "sdxl", "embedded", "sd1-inpaint"])
def test_every_family_has_it(name: str):
    [image] = txt2img(tiny(name), replace(SMALL, cfg_scale=4.0))
    assert image.size == (64, 48)


def test_a_texture_stays_one():
    [image] = txt2img(tiny("sd1"), replace(with_hires(upscaler="Lanczos"), width=32, height=32, tiling=True))
    assert np.asarray(image).std() > 1
    assert all(getattr(m, "padding_mode", "zeros") == "zeros" for m in tiny("sd1").unet.modules())


# --- mistakes


def test_mistakes_are_told_in_a_sentence():
    steps = sample(tiny("sd1"), with_hires(upscaler="Latnt"))
    with pytest.raises(LdmError, match="there is no upscaler 'Latnt'; choose from"):
        next(steps)  # before the first pass
    for field, value in (("scale", 0.5), ("scale", 17), ("strength", 1.1), ("steps", 0), ("width", 4)):
        with pytest.raises(RequestError, match=field):
            replace(Hires(), **{field: value})
    with pytest.raises(LdmError, match="did you mean"):
        plan(tiny("sd1"), with_hires(sampler="Eulr"))
