"""Classifier-free guidance: the formula, no work done in vain, and the rescaling of its contrast."""

import pytest
import torch
from torch import Tensor

from ldm.denoise import Conditioning, Denoiser, Prediction
from ldm.guidance import Guides, cfg, rescaled
from ldm.schedules import NoiseSchedule
from tests.tiny_families import tiny

SIGMA = 2.0


class Watched:
    """A network whose answer depends on everything that it is given, and which remembers its batches."""

    def __init__(self):
        self.batches: list[int] = []

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: object = None,
        adapter: object = None,
    ) -> Tensor:
        self.batches.append(len(x))
        assert context is not None
        return torch.tanh(x * context.mean((1, 2))[:, None, None, None])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def set_up(tokens: int = 4) -> tuple[Watched, Denoiser, Tensor, Conditioning, Conditioning]:
    network = Watched()
    denoiser = Denoiser(network, NoiseSchedule.scaled_linear(), Prediction.EPS)
    cond, uncond = Conditioning(gaussian(3, 4, 8, seed=1)), Conditioning(gaussian(3, tokens, 8, seed=2))
    return network, denoiser, gaussian(3, 4, 5, 5) * SIGMA, cond, uncond


def test_guidance_goes_from_the_unconditional_through_the_conditional_prediction():
    _, denoiser, x, cond, uncond = set_up()
    positive, negative = denoiser(x, SIGMA, cond), denoiser(x, SIGMA, uncond)
    for scale in (0.0, 0.5, 7.5):
        guided = cfg(denoiser, Guides.one(cond, uncond), scale)(x, SIGMA)
        torch.testing.assert_close(guided, negative + scale * (positive - negative))


def test_both_halves_run_in_one_batch():
    network, denoiser, x, cond, uncond = set_up()
    cfg(denoiser, Guides.one(cond, uncond), 7.0)(x, SIGMA)
    assert network.batches == [6]


def test_halves_of_different_length_run_one_after_the_other():
    network, denoiser, x, cond, uncond = set_up(tokens=8)
    guided = cfg(denoiser, Guides.one(cond, uncond), 7.0)(x, SIGMA)
    assert network.batches == [3, 3]
    positive, negative = denoiser(x, SIGMA, cond), denoiser(x, SIGMA, uncond)
    torch.testing.assert_close(guided, negative + 7 * (positive - negative))


def test_scale_1_computes_only_the_conditional_half():
    network, denoiser, x, cond, uncond = set_up()
    assert torch.equal(
        cfg(denoiser, Guides.one(cond, uncond), 1.0, rescale=0.7)(x, SIGMA), denoiser(x, SIGMA, cond)
    )
    assert network.batches == [3, 3]  # the one of guidance, and ours to compare with
    assert torch.equal(cfg(denoiser, Guides.one(cond), 7.0)(x, SIGMA), denoiser(x, SIGMA, cond))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_pair_in_one_batch_equals_two_calls(name: str):
    denoiser = tiny(name).denoiser
    config = tiny(name).unet.config
    width, size = config.context_dim, config.vector_dim
    assert width is not None
    cond, uncond = (
        Conditioning(gaussian(1, 77, width, seed=i), None if size is None else gaussian(1, size, seed=i + 2))
        for i in (1, 2)
    )
    x = gaussian(1, 4, 8, 8) * SIGMA
    with torch.no_grad():
        guided = cfg(denoiser, Guides.one(cond, uncond), 7.0)(x, SIGMA)
        positive, negative = denoiser(x, SIGMA, cond), denoiser(x, SIGMA, uncond)
    # The kernels may sum in another order for another batch size, and guidance multiplies that by 7.
    torch.testing.assert_close(guided, negative + 7 * (positive - negative), atol=5e-5, rtol=0)


def test_rescaling_restores_the_contrast_of_the_conditional_prediction():
    x = gaussian(2, 4, 8, 8) * SIGMA
    positive, guided = gaussian(2, 4, 8, 8, seed=1), 3 * gaussian(2, 4, 8, 8, seed=2)
    origin = x / (1 + SIGMA**2)  # the part of a denoised latent that a network for v does not predict
    full = rescaled(x, SIGMA, guided, positive, 1.0)
    torch.testing.assert_close((full - origin).std((1, 2, 3)), (positive - origin).std((1, 2, 3)))
    torch.testing.assert_close(rescaled(x, SIGMA, guided, positive, 0.0), guided)
    half = rescaled(x, SIGMA, guided, positive, 0.5)
    torch.testing.assert_close(half, (full + guided) / 2)


def test_rescaling_treats_every_picture_by_itself():
    x, positive, guided = (gaussian(2, 4, 8, 8, seed=i) for i in range(3))
    one = rescaled(x[:1], SIGMA, guided[:1], positive[:1], 0.7)
    torch.testing.assert_close(rescaled(x, SIGMA, guided, positive, 0.7)[:1], one)


def test_guidance_rescales_as_asked():
    _, denoiser, x, cond, uncond = set_up()
    positive, guided = denoiser(x, SIGMA, cond), cfg(denoiser, Guides.one(cond, uncond), 9.0)(x, SIGMA)
    expected = rescaled(x, SIGMA, guided, positive, 0.7)
    torch.testing.assert_close(cfg(denoiser, Guides.one(cond, uncond), 9.0, rescale=0.7)(x, SIGMA), expected)
