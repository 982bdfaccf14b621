"""Sampling from a consistency model, which jumps to the picture from any level."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.noise import Noise
from ldm.samplers.step import Step


@torch.no_grad()
def lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Jump to the picture, add noise of the next level, and again.

    Song et al. 2023, arXiv:2303.01469, algorithm 1; Luo et al. 2023, arXiv:2310.04378.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        x = denoised + sigma_next * noise(sigma, sigma_next) if sigma_next > 0 else denoised
        yield Step(i, sigma, sigma_next, x, denoised)
