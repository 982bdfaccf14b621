"""Linear multistep methods: one evaluation a step, and the slopes of the steps before.

All solve dx/dsigma = slope = (x - denoised) / sigma by x_next = x + sum_j w_j slope_j over the last few
slopes, newest first, and differ in the weights w alone. The first steps, which have no past, are of lower
order.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import log

import numpy as np
import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.noise import Noise
from ldm.samplers.step import Step

Weights = Callable[[Sequence[float], float], Sequence[float]]
"""(levels of the known slopes, newest first; the next level) -> one weight for each slope."""


def lms(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4
) -> Iterator[Step]:
    """Adams and Bashforth's method in sigma, for the unequal steps that a run makes (k-diffusion)."""
    return _multistep(denoise, x, sigmas, order, lambda levels, end: _integrate(levels, end, lambda s: s))


def deis(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 3
) -> Iterator[Step]:
    """The same with slopes that are polynomials in time instead of sigma. The step to 0 is Euler's.

    Zhang and Chen 2022, arXiv:2204.13902, tAB-DEIS. The time is that of a variance-preserving diffusion
    between sigma 0.002 and 80, whatever the network's own: the choice of diff-sampler, ComfyUI and Forge.
    """
    return _multistep(
        denoise,
        x,
        sigmas,
        order,
        lambda levels, end: _integrate(levels[: 1 if end == 0 else None], end, _vp_time),
    )


def ipndm(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4
) -> Iterator[Step]:
    """Adams and Bashforth's weights for equal steps, used whatever the steps are.

    Zhang and Chen 2022, arXiv:2204.13902, the improved pseudo numerical method of section 3.
    """
    return _multistep(
        denoise,
        x,
        sigmas,
        order,
        lambda levels, end: [w * (end - levels[0]) for w in EQUAL_STEPS[len(levels)]],
    )


def ipndm_v(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4
) -> Iterator[Step]:
    """The weights of diff-sampler, ComfyUI and Forge for unequal steps.

    Meant to be Adams and Bashforth's, from which three slips keep them (see `_ipndm_v_weights`). Kept as
    published, for the pictures made with it; `lms` is what it was meant to be.
    """
    return _multistep(denoise, x, sigmas, order, _ipndm_v_weights)


@torch.no_grad()
def plms(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """`ipndm` whose first step is Heun's, at the price of one evaluation more.

    Liu et al. 2022, arXiv:2202.09778, as in CompVis/latent-diffusion. Their step through the
    variance-preserving scale is x + slope (sigma_next - sigma) in ours, and their eps is the slope.
    """
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        if i == 0 and sigma_next > 0:
            x_next = x + slopes[0] * (sigma_next - sigma)
            mean = (slopes[0] + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
        else:
            mean = _weighted(EQUAL_STEPS[len(slopes)], slopes)
        x = x + mean * (sigma_next - sigma)
        yield Step(i, sigma, sigma_next, x, denoised)


# Adams and Bashforth's weights for equal steps, by the number of slopes.
EQUAL_STEPS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@torch.no_grad()
def _multistep(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], order: int, weights: Weights
) -> Iterator[Step]:
    """The loop that the methods share. order: how many slopes to use, 1 to 4; fewer at the start."""
    levels: list[float] = []
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        levels = [sigma, *levels[: order - 1]]
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        x = x + _weighted(weights(levels, sigma_next), slopes)
        yield Step(i, sigma, sigma_next, x, denoised)


def _weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """The weighted sum of the newest slopes, as many as there are weights."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=False):
        total = total + weight * slope
    return total


def _integrate(levels: Sequence[float], end: float, clock: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """The integrals over sigma, from levels[0] to end, of the Lagrange polynomials through the levels.

    clock: the variable in which they are polynomials, a function of sigma. Sixteen points of Gauss and
    Legendre are exact for polynomials and reach rounding error for the times used here.
    """
    points, shares = np.polynomial.legendre.leggauss(16)
    start = levels[0]
    times = clock(start + (end - start) * (points + 1) / 2)
    nodes = clock(np.array(levels))
    weights = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        polynomial = np.prod((times[:, None] - others) / (node - others), axis=1)
        weights.append(float(shares @ polynomial) * (end - start) / 2)
    return weights


def _vp_time(sigma: np.ndarray) -> np.ndarray:
    """Time t in [0.001, 1] of the diffusion with sigma^2 + 1 = exp(d t^2 / 2 + b t) from 0.002 to 80.

    Karras et al. 2022, arXiv:2206.00364, table 1, column VP, solved for t.
    """
    first, last, t_first = log(1 + 0.002**2), log(1 + 80.0**2), 1e-3
    d = 2 * (last - first / t_first) / (1 - t_first)
    b = last - d / 2
    return (np.sqrt(b**2 + 2 * d * np.log1p(sigma**2)) - b) / d


def _ipndm_v_weights(levels: Sequence[float], end: float) -> list[float]:
    """Weights on differences of slopes of rising order, from the next step h and those before, h1, h2, h3."""
    h, *past = [b - a for a, b in pairwise([*reversed(levels), end])][::-1]
    h1, h2, h3 = [*past, 1.0, 1.0, 1.0][:3]
    q, w = h1 / h2, h1 * (h1 + h2) / (h2 * (h2 + h3))
    sums = [h + h1, h + h1 + h2]
    first = h / (2 * h1)
    # First slip: Adams and Bashforth have (1 - a) / 2 * b here, the published code (1 - a b) / 2.
    second = (1 - h / (3 * sums[0]) * (h * sums[0]) / (h1 * (h1 + h2))) / 2
    # Second slip: with a minus, not a plus, equal steps would give 3/8, as they should.
    third = (1 - h / (3 * sums[0])) / 2 + (1 - h / (2 * sums[0])) * h / (6 * sums[1])
    third *= h * sums[0] * sums[1] / (h1 * (h1 + h2) * (h1 + h2 + h3))
    weights = {
        1: [1.0],
        2: [1 + first, -first],
        3: [1 + first + second, -first - (1 + q) * second, q * second],
        4: [
            1 + first + second + third,
            -first - (1 + q) * second - (1 + q + w) * third,
            q * second + (q + w * (1 + h2 / h3)) * third,
            -w * q * third,  # Third slip: h2 / h3 in place of q = h1 / h2 would make the weights sum to 1.
        ],
    }
    return [h * weight for weight in weights[len(levels)]]
