"""Heun's method and its variant Heun++: Euler, corrected by the slopes at the points it leads to."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.noise import Noise
from ldm.samplers.step import Churn, Step


@torch.no_grad()
def heun(
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
    """The mean of the slopes at both ends of the step; the last step is Euler's.

    Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """
    churn = Churn(noise, s_churn / (len(sigmas) - 1), s_tmin, s_tmax, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn(x, sigma)
        denoised = denoise(x, sigma_hat)
        slope = (x - denoised) / sigma_hat
        if sigma_next > 0:
            x_next = x + slope * (sigma_next - sigma_hat)
            slope = (slope + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
        x = x + slope * (sigma_next - sigma_hat)
        yield Step(i, sigma, sigma_next, x, denoised)


@torch.no_grad()
def heunpp2(
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
    """Looks up to two steps ahead and weighs the slopes found there by their level against the first level.

    A mixture whose weights depend on the whole run rather than on the step, hence of first order only. By
    Carzit (sd-webui-samplers-scheduler), as in ComfyUI and Forge.
    """
    churn = Churn(noise, s_churn / (len(sigmas) - 1), s_tmin, s_tmax, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn(x, sigma)
        denoised = denoise(x, sigma_hat)
        slope = (x - denoised) / sigma_hat
        mean, ahead, level = slope, x, sigma_hat
        levels_ahead = [s for s in sigmas[i + 1 : i + 3] if s > 0]
        last_slope = slope
        for level_ahead in levels_ahead:
            ahead = ahead + last_slope * (level_ahead - level)
            last_slope = (ahead - denoise(ahead, level_ahead)) / level_ahead
            mean = mean + (last_slope - slope) * (level_ahead / ((1 + len(levels_ahead)) * sigmas[0]))
            level = level_ahead
        x = x + mean * (sigma_next - sigma_hat)
        yield Step(i, sigma, sigma_next, x, denoised)
