"""DPM-Solver, the predecessor of DPM-Solver++: fast, with a fixed number of evaluations, and adaptive.

Both choose their own levels, equally spaced in lambda = -log sigma or as the error allows, and take from
`sigmas` only the ends: the first level and the last one above 0, where they stop. What is left of the noise
is too little to be seen.

Lu et al. 2022, arXiv:2206.00927; code by Katherine Crowson (k-diffusion).
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.errors import NotFiniteError
from ldm.noise import Noise
from ldm.samplers.step import Step, ancestral_step


@torch.no_grad()
def dpm_fast(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Third-order steps as long as the evaluations last, then lower ones: n of them for n steps asked for.

    Lu et al. 2022, section 3.4. A single step has no last level above 0 to stop at and goes to 0.
    """
    n = len(sigmas) - 1
    if n == 1:
        denoised = denoise(x, sigmas[0])
        yield Step(0, sigmas[0], 0.0, denoised, denoised)
        return
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]  # their sum is n
    levels = np.geomspace(sigmas[0], sigmas[-2], len(orders) + 1).tolist()
    for i, (order, (sigma, sigma_next)) in enumerate(zip(orders, pairwise(levels), strict=True)):
        down, up = _noisy_step(sigma, sigma_next, levels[-1], eta)
        denoised = denoise(x, sigma)
        _, x = _embedded_step(denoise, x, denoised, sigma, down, order)
        if up:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        yield Step(i, sigma, sigma_next, x, denoised)


@torch.no_grad()
def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Steps as long as two solutions of neighbouring order agree within a tolerance. Appendix C of the paper.

    The number of steps asked for does not matter. Each image of a batch has its own step lengths, so that it
    does not depend on the others; they run one after the other, the network seeing the whole batch each time,
    which makes a batch of n cost n * n single images. The only sampler that has to wait for a number from the
    device, the error, at each step.

    order: 2 or 3. rtol, atol: relative and absolute tolerance. h_init: the first step in lambda.
    pcoeff, icoeff, dcoeff, accept_safety: of the controller, see `StepLength`.
    """
    end = sigmas[-2] if len(sigmas) > 2 else sigmas[0] / ONE_STEP_RANGE
    x, denoised = x.clone(), x.clone()
    draws: list[Tensor] = []
    index = 0
    for image in range(len(x)):
        length = StepLength(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
        denoise_image = partial(_denoise_one, denoise, x, image)
        sigma, x_image, x_low = sigmas[0], x[image : image + 1], x[image : image + 1]
        accepted = 0
        while sigma > end * (1 + 1e-5):
            sigma_next = max(end, sigma * math.exp(-length.h))
            down, up = _noisy_step(sigma, sigma_next, end, eta)
            prediction = denoise_image(x_image, sigma)
            low, high = _embedded_step(denoise_image, x_image, prediction, sigma, down, order)
            tolerance = (rtol * torch.maximum(low.abs(), x_low.abs())).clamp(min=atol)
            if not length.accepts(float(((low - high) / tolerance).square().mean().sqrt())):
                continue
            x_low, x_image = low, high
            if up:
                if accepted == len(draws):
                    draws.append(noise(sigma, sigma_next))
                x_image = x_image + draws[accepted][image : image + 1] * (s_noise * up)
            x, denoised = _replace(x, image, x_image), _replace(denoised, image, prediction)
            yield Step(index, sigma, sigma_next, x, denoised)
            sigma, accepted, index = sigma_next, accepted + 1, index + 1


# Where a run of a single step, which names no lowest level, ends: about the range of Stable Diffusion.
ONE_STEP_RANGE = 500


class StepLength:
    """Chooses the next step length from the errors of the last three, and whether the last one may stand.

    A PID controller with the limiter of Söderlind and Wang 2006, as in k-diffusion: the step grows or shrinks
    by a factor 1 + atan(f - 1), f being a product of powers of the inverse errors, and stands if that factor
    is at least accept_safety.
    """

    def __init__(
        self, h: float, pcoeff: float, icoeff: float, dcoeff: float, order: float, accept_safety: float
    ):
        self.h = h
        self.powers = (
            (pcoeff + icoeff + dcoeff) / order,
            -(pcoeff + 2 * dcoeff) / order,
            dcoeff / order,
        )
        self.accept_safety = accept_safety
        self.past: list[float] = []  # inverse errors of the last two accepted steps, newest first

    def accepts(self, error: float) -> bool:
        """Judge a step by its error in units of the tolerance, and set the next length."""
        if not math.isfinite(error):
            raise NotFiniteError("the network gave NaN or infinity, so the next step has no length")
        inverse = 1 / (error + 1e-8)
        self.past = self.past or [inverse, inverse]
        product = math.prod(e**power for e, power in zip((inverse, *self.past), self.powers, strict=True))
        factor = 1 + math.atan(product - 1)
        self.h *= factor
        if factor < self.accept_safety:
            return False
        self.past = [inverse, self.past[0]]
        return True


def _embedded_step(
    denoise: Denoise, x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, order: int
) -> tuple[Tensor, Tensor]:
    """Solutions of the order below and of the order 1, 2 or 3, from `order` evaluations with the one given.

    Lu et al. 2022, eq. 3.7 and algorithms 1 and 2 with r1 = 1/2, or r1 = 1/3 and r2 = 2/3.
    """
    h = math.log(sigma / sigma_next)
    eps = (x - denoised) / sigma
    first = x + (sigma_next - sigma) * eps
    if order == 1:
        return first, first

    r1 = 1 / order
    sigma_1 = sigma * math.exp(-r1 * h)
    x_1 = x + (sigma_1 - sigma) * eps
    turn = (x_1 - denoise(x_1, sigma_1)) / sigma_1 - eps
    second = first + (sigma_next - sigma) / (2 * r1) * turn
    if order == 2:
        return first, second

    r2 = 2 / 3
    sigma_2 = sigma * math.exp(-r2 * h)
    bend = math.expm1(r2 * h) / (r2 * h) - 1
    x_2 = x + (sigma_2 - sigma) * eps - sigma_2 * (r2 / r1) * bend * turn
    turn = (x_2 - denoise(x_2, sigma_2)) / sigma_2 - eps
    return second, first - sigma_next / r2 * (math.expm1(h) / h - 1) * turn


def _noisy_step(sigma: float, sigma_next: float, end: float, eta: float) -> tuple[float, float]:
    """An ancestral step that does not go below the end of the run."""
    down = max(end, ancestral_step(sigma, sigma_next, eta)[0])
    return down, math.sqrt(sigma_next**2 - down**2)


def _replace(x: Tensor, image: int, x_image: Tensor) -> Tensor:
    """x (B, C, h, w) with one image in it replaced."""
    return torch.cat((x[:image], x_image, x[image + 1 :]))


def _denoise_one(denoise: Denoise, x: Tensor, image: int, x_image: Tensor, sigma: float) -> Tensor:
    """The network on one image at its place in the batch, where its conditioning is."""
    return denoise(_replace(x, image, x_image), sigma)[image : image + 1]
