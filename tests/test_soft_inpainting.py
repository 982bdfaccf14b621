"""Soft inpainting: its formulas against plain loops and closed forms, and what it must leave alone."""

import math
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.edit import Edit
from ldm.errors import RequestError
from ldm.inputs import Inputs
from ldm.pipeline import pictures, plan
from ldm.request import Request
from ldm.soft_inpainting import Soft, _window_mean, blended, mask_at, visible
from tests.tiny_families import tiny

SOFT = Soft()


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(seed))


def ramp() -> Tensor:
    """A mask that rises from 0 to 1 along the rows, both ends included."""
    return torch.linspace(0, 1, 9).expand(1, 1, 7, 9)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
@pytest.mark.parametrize("bias", [0.0, 1.0, 8.0])
def test_the_mask_of_a_step_is_a_power_of_the_mask(sigma: float, bias: float):
    mask = mask_at(Soft(schedule_bias=bias, preservation=0.5), ramp(), sigma)
    expected = [m ** (sigma**bias * 0.5) if m else 0.0 for m in ramp()[0, 0, 0].tolist()]
    assert torch.allclose(mask[0, 0, 0], torch.tensor(expected), atol=1e-6)  # float32 powers


def test_less_noise_frees_more_of_the_picture():
    masks = [mask_at(SOFT, ramp(), sigma) for sigma in (14.6, 3.0, 0.5, 0.03)]
    for noisy, clean in pairwise(masks):
        assert (clean >= noisy).all()
    assert (masks[-1][..., 1:] > 0.9).all()
    assert (mask_at(Soft(preservation=0), ramp(), 1.0)[..., 1:] == 1).all()
    assert (
        mask_at(Soft(preservation=0), ramp(), 1.0)[..., 0] == 0
    ).all()  # what is not masked stays even then


@pytest.mark.parametrize("boost", [1.0, 4.0, 32.0])
def test_lengths_are_blended_apart_from_directions(boost: float):
    """Direction of the linear mix; length the power mean of both lengths. For any pixel, in float64."""
    a, b, sigma = latents(0), latents(1), 0.7
    result = blended(Soft(contrast_boost=boost), a, b, ramp(), sigma)
    for x in range(1, 9):
        share = mask_at(Soft(contrast_boost=boost), ramp(), sigma)[0, 0, 0, x].item()
        va, vb, v = (t[1, :, 3, x].double().numpy() for t in (a, b, result))
        mix = va * (1 - share) + vb * share
        lengths = [np.linalg.norm(one) for one in (va, vb)]
        length = (lengths[0] ** boost * (1 - share) + lengths[1] ** boost * share) ** (1 / boost)
        assert np.abs(v - mix / np.linalg.norm(mix) * length).max() < 1e-4  # of the 1e-5 in the divisor


def test_opposite_latents_do_not_wash_out():
    """The plain mean of x and -x/2 has a quarter of the length; the blend nearly that of the longer one."""
    x = latents()
    half = torch.full((1, 1, 7, 9), 0.5)
    result = blended(Soft(preservation=1), x, -x / 2, half, 1.0)
    assert torch.allclose(result.norm(dim=1) / x.norm(dim=1), torch.tensor((0.5 + 0.5**5) ** 0.25), rtol=1e-3)


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 1.0, 14.6, 150.0])
def test_the_ends_of_the_mask_are_the_picture_and_the_result(sigma: float):
    original, denoised = latents(0), latents(1)
    kept, drawn = original.clone(), denoised.clone()
    result = blended(SOFT, original, denoised, ramp(), sigma)
    assert torch.equal(result[..., 0], original[..., 0])  # to the bit
    assert torch.allclose(result[..., -1], denoised[..., -1], rtol=1e-4)
    assert torch.isfinite(result).all()
    assert torch.equal(original, kept)
    assert torch.equal(denoised, drawn)


def test_latents_of_zero_stay_finite():
    for settings in (SOFT, Soft(contrast_boost=32), Soft(contrast_boost=1)):
        assert torch.equal(blended(settings, torch.zeros(1, 4, 7, 9), torch.zeros(1, 4, 7, 9), ramp(), 1.0),
                           torch.zeros(1, 4, 7, 9))  # fmt: skip


def slow_window_mean(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """The filter in the way it is described: a stack of weighted values, of which a slice is averaged."""
    zero = math.exp(-9 / 2.25)
    result = np.empty_like(image)
    for y, x in np.ndindex(*image.shape):
        stack = []
        for j, i in np.ndindex(*image.shape):
            squared = (j - y) ** 2 + (i - x) ** 2
            if max(abs(j - y), abs(i - x)) <= 2:
                stack.append((image[j, i], max(0.0, (math.exp(-squared / 2.25) - zero) / (1 - zero))))
        stack.sort()
        total = sum(weight for _, weight in stack)
        start, end = total * low, total * high
        if end - start < 1:
            middle = (start + end) / 2
            start, end = middle - 0.5, middle + 0.5
            if end > total:
                start, end = total - 1, total
            if start < 0:
                start, end = 0, 1
        at, value, covered = 0.0, 0.0, 0.0
        for level, weight in stack:
            share = max(min(end, at + weight) - max(start, at), 0.0)
            at, value, covered = at + weight, value + level * share, covered + share
        result[y, x] = value / covered
    return result


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.0), (0.25, 0.75), (0.0, 0.05)])
@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (2, 1), (3, 4)])
def test_the_filter_is_the_mean_of_a_slice_of_weighted_values(
    low: float, high: float, shape: tuple[int, int]
):
    image = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    for one, fast in zip(image, _window_mean(image, low, high), strict=True):
        slow = slow_window_mean(one[0].double().numpy(), low, high)
        assert np.abs(fast[0].numpy() - slow).max() < 1e-5  # float32 sums of 25 weights


def test_only_what_changed_is_shown():
    original = latents()
    finished = original.clone()
    finished[:, :, :, 6:] += 5
    shown = visible(SOFT, original, finished, torch.ones(1, 1, 7, 9))
    assert shown.shape == (2, 1, 7, 9)
    assert shown[..., :3].max() == 0
    assert shown[..., 7:].min() > 0.999
    assert (visible(SOFT, original, original, ramp()) == 0).all()


def test_half_is_shown_at_the_threshold():
    """A change of the same length everywhere passes the filters as it is."""
    original = latents()
    for threshold in (0.25, 0.5, 2.0):
        finished = original.clone()
        finished[:, 0] += threshold
        shown = visible(Soft(difference_threshold=threshold), original, finished, ramp())
        assert torch.allclose(shown, torch.tensor(0.5), atol=1e-4)
    stronger = visible(SOFT, original, original + 1, ramp())
    assert (stronger > 0.5).all()


def test_the_mask_can_decide_what_is_shown():
    original = latents()
    finished = original.clone()
    finished[:, 0] += 0.5
    shown = visible(Soft(mask_influence=1), original, finished, ramp())[0, 0, 0]
    assert shown[0] < 1e-4  # outside the mask, no change is shown
    assert shown[-1] == 1
    assert (shown.diff() >= 0).all()


@pytest.mark.parametrize(
    "settings", [{"preservation": 0}, {"difference_threshold": 0}, {"difference_contrast": 0}]
)
@pytest.mark.parametrize("influence", [0.0, 1.0])
def test_extreme_settings_stay_between_0_and_1(settings: dict, influence: float):
    shown = visible(Soft(mask_influence=influence, **settings), latents(0), latents(1), ramp())
    assert torch.isfinite(shown).all()
    assert shown.min() >= 0
    assert shown.max() <= 1


@pytest.mark.parametrize(
    "setting",
    [
        {"schedule_bias": -1},
        {"preservation": 9},
        {"contrast_boost": 0},
        {"mask_influence": 2},
        {"difference_threshold": -0.1},
        {"difference_contrast": float("nan")},
    ],
)
def test_settings_out_of_range_are_told(setting: dict):
    with pytest.raises(RequestError, match="of soft inpainting must be"):
        Soft(**setting)


@pytest.mark.parametrize(("soft", "encoded"), [(Soft(), 1), (None, 0)])
def test_the_given_picture_is_encoded_once_for_all_pictures_of_a_batch(soft: Soft | None, encoded: int):
    vae = deepcopy(tiny("sd1").vae)
    assert vae is not None
    models = replace(tiny("sd1"), vae=vae)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    request = Request(prompt="a cat", steps=2, width=32, height=32, batch_size=3, edit=Edit(soft=soft))
    run = plan(models, request, Inputs(picture=Image.linear_gradient("L").resize((32, 32)), mask=mask))
    runs: list[object] = []
    vae.encoder.register_forward_pre_hook(lambda encoder, _: runs.append(encoder))
    finished = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    alone = [pictures(models, run, finished[[i]])[0] for i in range(3)]
    assert len(runs) == 3 * encoded
    runs.clear()
    assert [one.tobytes() for one in pictures(models, run, finished)] == [one.tobytes() for one in alone]
    assert len(runs) == encoded
