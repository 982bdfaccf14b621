"""UniPC: a multistep predictor, corrected by the evaluation that the next step needs anyway."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.errors import SamplerError
from ldm.noise import Noise
from ldm.samplers.step import Step


@torch.no_grad()
def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 3,
    variant: str = "bh1",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """Zhao et al. 2023, arXiv:2302.04867, algorithms 5 to 8, on predictions of the picture.

    Written for lambda = -log sigma, as in `ldm.samplers.dpmpp`. One evaluation a step; with the corrector a
    method of order p becomes one of order p + 1.

    order: 1, 2 or 3, at most the number of steps.
    variant: "bh1" or "bh2", the paper's functions B(h) = h and e^h - 1; or "vary_coeff". They differ only
        where the paper leaves the equations of one unknown unsolved, see `_weights`. The published code of
        "vary_coeff" drops a row of its corrector, which costs it its order; here it is whole.
    lower_order_final: end with steps of falling order, which is steadier where the steps are few.
    """
    if variant not in ("bh1", "bh2", "vary_coeff"):
        raise SamplerError(f"variant must be 'bh1', 'bh2' or 'vary_coeff', got {variant!r}")
    steps = len(sigmas) - 1
    denoised = denoise(x, sigmas[0])
    past: list[tuple[float, Tensor]] = []  # (level, prediction), newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if sigma_next == 0:
            yield Step(i, sigma, sigma_next, denoised, denoised)
            return
        h = math.log(sigma / sigma_next)
        p = min(order, i + 1, steps - i if lower_order_final else order)
        # Slopes of the prediction towards earlier points, which lie at the places r h from this one.
        places = [math.log(sigma / level) / h for level, _ in past[: p - 1]]
        slopes = [(earlier - denoised) / r for r, (_, earlier) in zip(places, past[: p - 1], strict=True)]
        keep = sigma_next / sigma
        first_order = keep * x + (1 - keep) * denoised
        x = _add(first_order, _weights(places, h, variant), slopes)
        step_denoised = denoised
        if i + 1 < steps:
            past = [(sigma, denoised), *past[:1]]
            denoised_next = denoise(x, sigma_next)
            slopes.append(denoised_next - denoised)
            x = _add(first_order, _weights([*places, 1.0], h, variant), slopes)
            denoised = denoised_next
        yield Step(i, sigma, sigma_next, x, step_denoised)


def _weights(places: Sequence[float], h: float, variant: str) -> list[float]:
    """The weights of the slopes towards `places`, so that the step is exact for polynomials of their number.

    They solve sum_j w_j r_j^(k-1) = m_k for k = 1, 2 ..., where m_k is the integral of e^(s-h) (s/h)^k over
    0 < s < h, and by parts m_k = 1 - k m_(k-1) / h: the paper's eq. 10 and 11, in which B(h) cancels. But
    for a single place the paper takes B(h) / 2 instead of the solution.
    """
    if not places:
        return []
    if len(places) == 1 and variant != "vary_coeff":
        return [(h if variant == "bh1" else -math.expm1(-h)) / 2]
    moment, moments = -math.expm1(-h), []
    for k in range(1, len(places) + 1):
        moment = 1 - k * moment / h
        moments.append(moment)
    return np.linalg.solve(np.vander(places, increasing=True).T, moments).tolist()


def _add(x: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        x = x + weight * slope
    return x
