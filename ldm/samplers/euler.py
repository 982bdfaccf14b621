"""Euler's method, plain and ancestral."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.noise import Noise
from ldm.samplers.step import Denoise, Step, ancestral_step


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


class Churn:
    """Lifts x to a higher noise level before a step. Karras et al. 2022, algorithm 2, lines 4 to 6.

    gamma: the relative lift, at most sqrt(2) - 1. low, high: the levels between which it is done.
    """

    def __init__(self, noise: Noise, gamma: float, low: float, high: float, s_noise: float):
        self.noise, self.gamma, self.low, self.high, self.s_noise = noise, gamma, low, high, s_noise

    def __call__(self, x: Tensor, sigma: float) -> tuple[Tensor, float]:
        """x at sigma -> x and the level it was lifted to."""
        if not self.gamma:
            return x, sigma
        # Asked for at every step, inside the window or not, so that the window does not shift the noise.
        noise = self.noise(sigma, sigma)
        if not self.low <= sigma <= self.high:
            return x, sigma
        sigma_hat = sigma * (1 + min(self.gamma, math.sqrt(2) - 1))
        return x + noise * (self.s_noise * math.sqrt(sigma_hat**2 - sigma**2)), sigma_hat
