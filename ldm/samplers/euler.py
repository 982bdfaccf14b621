"""Euler's method, plain and ancestral."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.noise import Noise
from ldm.samplers.step import Churn, Step, ancestral_step


@torch.no_grad()
def euler(
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
    """Explicit Euler on dx/dsigma = (x - denoised) / sigma.

    Karras et al. 2022, arXiv:2206.00364, algorithm 2 without its second-order correction.
    """
    churn = Churn(noise, s_churn / (len(sigmas) - 1), s_tmin, s_tmax, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn(x, sigma)
        denoised = denoise(x, sigma_hat)
        x = x + (x - denoised) * ((sigma_next - sigma_hat) / sigma_hat)
        yield Step(i, sigma, sigma_next, x, denoised)


@torch.no_grad()
def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Euler steps below the next level, then noise up to it.

    k-diffusion's `sample_euler_ancestral`. The same method as DDIM of that eta: see `ldm.samplers.ddim`.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = x + (x - denoised) * ((down - sigma) / sigma)
        if up:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        yield Step(i, sigma, sigma_next, x, denoised)
