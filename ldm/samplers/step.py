"""What a sampler yields, and the two ways of adding noise on the way that many of them share."""

import math
from typing import NamedTuple

from torch import Tensor

from ldm.noise import Noise


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
