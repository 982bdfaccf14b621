"""DPM2: the midpoint method, with the middle taken in log sigma."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.noise import Noise
from ldm.samplers.step import Churn, Step, ancestral_step


def _midpoint(denoise: Denoise, x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """A step with the slope found half way; a step to 0, which has no middle in log sigma, is Euler's."""
    if sigma_next == 0:
        return denoised
    sigma_mid = math.sqrt(sigma * sigma_next)
    x_mid = x + (x - denoised) * ((sigma_mid - sigma) / sigma)
    return x + (x_mid - denoise(x_mid, sigma_mid)) * ((sigma_next - sigma) / sigma_mid)


@torch.no_grad()
def dpm_2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Lu et al. 2022, "DPM-Solver", arXiv:2206.00927, algorithm 1, with the churn of Karras et al. 2022."""
    churn = Churn(noise, s_churn / (len(sigmas) - 1), s_tmin, s_tmax, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn(x, sigma)
        denoised = denoise(x, sigma_hat)
        x = _midpoint(denoise, x, denoised, sigma_hat, sigma_next)
        yield Step(i, sigma, sigma_next, x, denoised)


@torch.no_grad()
def dpm_2_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """The same, to below the next level and with noise back up to it (k-diffusion)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = _midpoint(denoise, x, denoised, sigma, down)
        if up:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        yield Step(i, sigma, sigma_next, x, denoised)
