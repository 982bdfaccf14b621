"""A second model takes over near the end of a run."""

from collections import deque
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning import denoisers
from ldm.edit import Edit, Hires
from ldm.inputs import NO_INPUTS, Inputs
from ldm.models import Models
from ldm.pipeline import inpaint, plan, sample, txt2img
from ldm.request import Request
from ldm.samplers import SAMPLERS, Step
from tests.tiny_families import tiny

SMALL = Request(
    prompt="a cat",
    width=32,
    height=24,
    steps=5,
    seed=7,
    cfg_scale=3.0,
    sampler="Euler",
    negative_prompt="dim",
)


def pair() -> Models:
    return replace(tiny("sdxl"), refiner=tiny("sdxl-refiner"))


def last(models: Models, request: Request, inputs: Inputs = NO_INPUTS) -> Tensor:
    return deque[Step](sample(models, request, inputs), maxlen=1).pop().x


def refined_from(request: Request) -> int:
    """The first step of the refiner, found by which network runs."""
    run = plan(pair(), replace(request, cfg_scale=1.0))
    ours, base = (denoisers(one, run) for one in (pair(), tiny("sdxl")))
    x = torch.randn(1, 4, 3, 4)
    with torch.no_grad():
        same = [torch.equal(a(x, s), b(x, s)) for a, b, s in zip(ours, base, run.sigmas, strict=False)]
    assert same == sorted(same, reverse=True)
    return sum(same)


@pytest.mark.parametrize("sampler", ["Euler", "Euler Karras", "DDIM", "UniPC"])
@pytest.mark.parametrize("switch", [0.0, 0.3, 0.8, 1.0])
def test_it_takes_over_by_the_training_step_as_in_the_web_ui(sampler: str, switch: float):
    """Whose rule is (999 - t) / 1000 > switch, t being the training step nearest to the noise level."""
    request = replace(SMALL, sampler=sampler, steps=8, refiner_switch=switch)
    levels = np.array(pair().denoiser.schedule.sigmas)
    nearest = [int(np.abs(levels - sigma).argmin()) for sigma in plan(pair(), request).sigmas[:-1]]
    assert refined_from(request) == sum((999 - t) / 1000 <= switch for t in nearest)


def test_a_switch_at_the_end_leaves_it_out():
    request = replace(SMALL, refiner_switch=1.0)
    assert torch.equal(last(pair(), request), last(tiny("sdxl"), request))


def test_the_refiner_goes_on_where_the_base_stopped():
    request = replace(SMALL, refiner_switch=0.5)
    steps = list(sample(pair(), request))
    base = list(sample(tiny("sdxl"), request))
    switch = refined_from(request)
    assert 0 < switch < 5
    assert all(torch.equal(a.x, b.x) for a, b in zip(steps[:switch], base[:switch], strict=True))

    # The rest is a run of the refiner's own, with its own reading of both prompts.
    alone = denoisers(tiny("sdxl-refiner"), plan(tiny("sdxl-refiner"), request))
    x, sigmas = base[switch - 1].x, plan(pair(), request).sigmas
    with torch.no_grad():
        for step, (sigma, sigma_next) in [*enumerate(pairwise(sigmas))][switch:]:
            x = x + (sigma_next - sigma) * (x - alone[step](x, sigma)) / sigma
    torch.testing.assert_close(steps[-1].x, x, atol=1e-4, rtol=0)  # values up to 30, in float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_works_with_every_sampler(name: str):
    request = replace(SMALL, sampler=name, cfg_scale=1.0, steps=3)
    assert last(pair(), request).isfinite().all()


def test_of_two_passes_the_last_one_is_refined():
    request = replace(SMALL, refiner_switch=0.5, hires=Hires(strength=0.6))
    run = plan(pair(), request)
    assert run.second is not None
    assert len(set(denoisers(pair(), run))) == 1
    assert len(set(denoisers(pair(), run.second))) == 2
    [image] = txt2img(pair(), request)
    assert image.size == (64, 48)


def test_it_refines_given_pictures_and_textures():
    picture, mask = Image.radial_gradient("L").resize((32, 32)).convert("RGB"), Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    request = replace(SMALL, height=32, tiling=True, edit=Edit(mask_blur=0))
    [result] = inpaint(pair(), request, picture, mask)
    kept = np.asarray(mask) == 0
    assert (np.asarray(result)[kept] == np.asarray(picture)[kept]).all()
    assert (np.asarray(result)[~kept] != np.asarray(picture)[~kept]).any(axis=1).mean() > 0.9
    networks = (pair().unet, tiny("sdxl-refiner").unet)
    assert all(getattr(m, "padding_mode", "zeros") == "zeros" for net in networks for m in net.modules())
