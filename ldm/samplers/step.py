"""What a sampler yields, and the stochastic step that many of them share."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""x (B, C, h, w) with noise of level sigma, sigma -> the picture in it, of the same shape."""


class Step(NamedTuple):
    """One step of a run.

    index: counts the steps from 0. sigma, sigma_next: the noise level before and after it.
    x: the state after the step, (B, C, h, w), with noise of level sigma_next.
    denoised: what the network took the picture to be, at the start of the step.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index, which no one needs)
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split a step into a deterministic one down to the first result, and fresh noise of the second.

    With eta = 1 the step has the distribution of the diffusion run backwards (Ho et al. 2020,
    arXiv:2006.11239, eq. 7), with eta = 0 it adds nothing. In either case down^2 + up^2 = sigma_next^2.
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up
