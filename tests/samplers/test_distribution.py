"""The stochastic samplers draw from the right distribution.

For Gaussian data of mean 0 the ideal denoiser is linear, so the result of a run is a weighted sum of its
start and of all the noise it asked for. The weights, and with them the exact variance, come out of a single
run whose "channels" are the sources of randomness: channel j follows what becomes of source j. Nothing is
drawn.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.samplers import ddim, dpm2, dpmpp, euler, heun, restart
from ldm.spacings import karras
from tests.samplers.toy import last

HIGH, LOW = 14.6, 0.03
STD = 0.8


def denoise(x: Tensor, sigma: float) -> Tensor:
    return x * (STD**2 / (STD**2 + sigma**2))


class WhiteSources:
    """The k-th request is source k + 1; source 0 is the start."""

    def __init__(self, levels: list[float]):
        self.count, self.asked = 2 * len(levels), 0

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        self.asked += 1
        source = torch.zeros(1, self.count, 1, 1, dtype=torch.float64)
        source[0, self.asked] = 1
        return source


class BrownianSources:
    """The sources are the increments of a Brownian motion over the smallest intervals that a run asks for."""

    def __init__(self, levels: list[float]):
        middles = [math.sqrt(a * b) for a, b in pairwise(levels[:-1])]
        self.edges = sorted([*levels[:-1], *middles])
        self.count = len(self.edges)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        weights = [0.0]
        for low, high in pairwise(self.edges):
            inside = sigma_next - 1e-9 < low and high < sigma + 1e-9
            weights.append(math.sqrt((high - low) / (sigma - sigma_next)) if inside else 0.0)
        return torch.tensor(weights, dtype=torch.float64).view(1, -1, 1, 1)


def variance_error(sampler: Callable, steps: int, sources: type) -> float:
    """The error of the result's variance, relative to what it should be.

    The last step of a run returns the mean of the pictures that are possible at level LOW, and the variance
    of that mean is smaller than the data's by the factor STD^2 / (STD^2 + LOW^2).
    """
    levels = [*karras(steps, LOW, HIGH), 0.0]
    noise = sources(levels)
    x = torch.zeros(1, noise.count, 1, 1, dtype=torch.float64)
    x[0, 0] = math.hypot(HIGH, STD)
    variance = float(last(sampler(denoise, x, levels, noise)).square().sum())
    return abs(variance / (STD**4 / (STD**2 + LOW**2)) - 1)


STOCHASTIC = {
    "euler_ancestral": (euler.euler_ancestral, WhiteSources),
    "euler_ancestral eta 0.5": (partial(euler.euler_ancestral, eta=0.5), WhiteSources),
    "euler with churn": (partial(euler.euler, s_churn=20.0), WhiteSources),
    "heun with churn": (partial(heun.heun, s_churn=20.0), WhiteSources),
    "dpm_2 with churn": (partial(dpm2.dpm_2, s_churn=20.0), WhiteSources),
    "ddpm": (ddim.ddpm, WhiteSources),
    "ddim eta 1": (partial(ddim.ddim, eta=1.0), WhiteSources),
    "dpm_2_ancestral": (dpm2.dpm_2_ancestral, WhiteSources),
    "dpmpp_2s_ancestral": (dpmpp.dpmpp_2s_ancestral, WhiteSources),
    "restart": (restart.restart, WhiteSources),
    "dpmpp_sde": (dpmpp.dpmpp_sde, BrownianSources),
    "dpmpp_2m_sde": (dpmpp.dpmpp_2m_sde, BrownianSources),
    "dpmpp_2m_sde heun": (partial(dpmpp.dpmpp_2m_sde, solver_type="heun"), BrownianSources),
    "dpmpp_3m_sde": (dpmpp.dpmpp_3m_sde, BrownianSources),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_variance_converges_to_that_of_the_data(name: str):
    """At least in proportion to the step length: four times the steps, at most a third of the error."""
    sampler, sources = STOCHASTIC[name]
    coarse, fine = (variance_error(sampler, steps, sources) for steps in (80, 320))
    assert fine < 0.05
    assert fine < coarse / 3


def test_one_ancestral_step_is_a_draw_from_the_posterior():
    """For data of a single point, a step with eta 1 has exactly the covariance of the forward process."""
    sigma, sigma_next = 2.0, 0.7
    noise = WhiteSources([sigma])
    x = torch.zeros(1, noise.count, 1, 1, dtype=torch.float64)
    x[0, 0] = sigma
    (step,) = ddim.ddpm(lambda x, sigma: torch.zeros_like(x), x, [sigma, sigma_next], noise)
    assert float(step.x.square().sum()) == pytest.approx(sigma_next**2)
    assert float((step.x * x).sum()) == pytest.approx(sigma_next**2)
