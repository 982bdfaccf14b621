"""DDIM and DDPM, which turn out to be Euler's method with and without noise.

In the variance-preserving scale, y = x / sqrt(1 + sigma^2), DDIM goes from abar to abar_next by

    y_next = sqrt(abar_next) denoised + sqrt(1 - abar_next - s^2) eps + s noise
    s^2 = eta^2 (1 - abar_next) / (1 - abar) (1 - abar / abar_next)

Divide by sqrt(abar_next). With eps = (x - denoised) / sigma and sigma^2 = (1 - abar) / abar this is

    x_next = denoised + down (x - denoised) / sigma + up noise
    up^2 = eta^2 sigma_next^2 (1 - sigma_next^2 / sigma^2),    down^2 + up^2 = sigma_next^2

an ancestral Euler step of that eta. What tells the two apart is custom: which levels they visit, how x
starts, and that DDIM adds no noise unless asked to.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ldm.denoise import Denoise
from ldm.noise import Noise
from ldm.samplers.euler import euler_ancestral
from ldm.samplers.step import Step


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Song et al. 2020, arXiv:2010.02502, eq. 12 and 16. s_noise is the temperature of CompVis."""
    return euler_ancestral(denoise, x, sigmas, noise, eta=eta, s_noise=s_noise)


def ddpm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7: each step draws from the posterior, which is eta = 1."""
    return euler_ancestral(denoise, x, sigmas, noise, eta=1.0)
