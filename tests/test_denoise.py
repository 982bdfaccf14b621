"""The denoiser turns what a network predicts into the latent without noise, for eps and for v alike."""

import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.denoise import Conditioning, Denoiser, Prediction
from ldm.schedules import NoiseSchedule
from tests.golden import golden

SCHEDULE = NoiseSchedule.scaled_linear()


def posterior_mean(x: Tensor, sigma: float, mean: float, std: float) -> Tensor:
    """E[x0 | x0 + sigma * noise = x] for x0 ~ N(mean, std^2)."""
    return (mean * sigma**2 + x * std**2) / (std**2 + sigma**2)


class Ideal:
    """The best possible network for x0 ~ N(mean, std^2), in the variance-preserving view it is trained in."""

    def __init__(self, prediction: Prediction, mean: float = 0.3, std: float = 0.8):
        self.prediction, self.mean, self.std = prediction, mean, std
        self.t: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: object = None,
        adapter: object = None,
    ) -> Tensor:
        self.t = t
        abar = 1 / (1 + SCHEDULE.sigma(float(t[0])) ** 2)
        signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
        # x = signal * x0 + noise * eps, so both estimates follow from Gaussian regression.
        gain = signal * self.std**2 / (abar * self.std**2 + 1 - abar)
        x0 = self.mean + gain * (x - signal * self.mean)
        eps = (x - signal * x0) / noise
        return eps if self.prediction is Prediction.EPS else signal * eps - noise * x0


class Watched:
    """A network with a simple answer, which remembers its inputs."""

    def __init__(self, answer: Callable[[Tensor], Tensor]):
        self.answer = answer
        self.inputs: list[Tensor] = []

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: object = None,
        adapter: object = None,
    ) -> Tensor:
        self.inputs.append(x)
        return self.answer(x)


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("sigma", [SCHEDULE.sigma_min, 0.1, 1.0, 3.7, SCHEDULE.sigma_max])
def test_an_ideal_network_gives_the_exact_posterior_mean(prediction: Prediction, sigma: float):
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * sigma + 0.3
    before = x.clone()
    denoised = Denoiser(Ideal(prediction), SCHEDULE, prediction)(x, sigma, Conditioning())
    # float32 timesteps near 999 are exact to 6e-5, which is 4e-7 of sigma; eps then multiplies by sigma.
    torch.testing.assert_close(denoised, posterior_mean(x, sigma, 0.3, 0.8), atol=2e-5, rtol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("prediction", Prediction)
def test_scalings_are_those_of_k_diffusion(prediction: Prediction):
    values = load_file(golden("schedules/schedules.safetensors"))
    network = Watched(torch.ones_like)

    def denoised(x: Tensor, sigma: float) -> float:
        return Denoiser(network, SCHEDULE, prediction)(x, sigma, Conditioning()).item()

    key = "eps" if prediction is Prediction.EPS else "v"
    for i, sigma in enumerate(values["conv/sigma"].tolist()):
        c_out = denoised(torch.zeros(1, 1, 1, 1), sigma)
        c_skip = denoised(torch.ones(1, 1, 1, 1), sigma) - c_out
        expected_skip = values["conv/v_c_skip"][i].item() if prediction is Prediction.V else 1.0
        assert network.inputs[-1].item() == pytest.approx(values[f"conv/{key}_c_in"][i].item(), rel=1e-6)
        assert c_out == pytest.approx(values[f"conv/{key}_c_out"][i].item(), rel=1e-6)
        # A difference of numbers of size c_out, in float32.
        assert c_skip == pytest.approx(expected_skip, abs=2e-7 * max(1, abs(c_out)), rel=1e-5)


def test_the_network_sees_the_fractional_timestep_of_sigma_for_every_picture():
    network = Ideal(Prediction.EPS)
    sigma = SCHEDULE.sigma(500.25)
    Denoiser(network, SCHEDULE, Prediction.EPS)(torch.zeros(3, 4, 2, 2), sigma, Conditioning())
    assert network.t is not None
    torch.testing.assert_close(network.t, torch.full((3,), 500.25), atol=1e-4, rtol=0)


def test_further_channels_join_unscaled_behind_the_latent():
    mask, latent = torch.full((2, 5, 2, 2), 7.0), torch.ones(2, 4, 2, 2)
    network = Watched(lambda x: x[:, :4])
    denoiser = Denoiser(network, SCHEDULE, Prediction.EPS)
    assert denoiser(latent, 1.0, Conditioning(concat=mask)).shape == latent.shape
    assert torch.equal(network.inputs[0][:, 4:], mask)
    torch.testing.assert_close(network.inputs[0][:, :4], latent / math.sqrt(2))


def test_a_half_precision_network_leaves_the_latent_in_float32():
    network = Watched(lambda x: x)
    denoiser = Denoiser(network, SCHEDULE, Prediction.EPS, torch.bfloat16)
    assert denoiser(torch.ones(1, 4, 2, 2), 1.0, Conditioning()).dtype == torch.float32
    assert network.inputs[0].dtype == torch.bfloat16


def test_conditioning_of_one_serves_a_batch_without_a_copy():
    one = Conditioning(torch.randn(1, 77, 8), torch.randn(1, 5), torch.randn(1, 5, 2, 2))
    three = one.expanded(3)
    assert three.context is not None
    assert three.vector is not None
    assert three.concat is not None
    assert (three.context.shape, three.vector.shape, three.concat.shape) == ((3, 77, 8), (3, 5), (3, 5, 2, 2))
    assert one.context is not None
    assert three.context.data_ptr() == one.context.data_ptr()
    assert Conditioning().expanded(3) == Conditioning()
