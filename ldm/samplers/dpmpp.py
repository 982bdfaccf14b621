"""DPM-Solver++ and its stochastic relatives, the most used samplers of Stable Diffusion.

In half the logarithm of the signal-to-noise ratio, lambda = -log sigma, the diffusion ODE is linear but for
the denoised picture. Solving the linear part exactly gives, for a step of length h = log(sigma / sigma_next),

    x_next = e^-h x + integral over the step of e^(lambda - lambda_next) denoised(lambda) dlambda

and the methods differ in how they extrapolate `denoised` over the step. With denoised constant it is
x_next = keep x + (1 - keep) denoised with keep = sigma_next / sigma: Euler's method, or DDIM. A last step to
sigma = 0 has keep = 0, so it returns what was denoised, and no logarithm of 0 is taken.

Lu et al. 2022, "DPM-Solver++", arXiv:2211.01095; stochastic versions by Katherine Crowson (k-diffusion).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.errors import SamplerError
from ldm.noise import Noise
from ldm.samplers.step import Step, ancestral_step


def _mix(x: Tensor, denoised: Tensor, keep: float) -> Tensor:
    return keep * x + (1 - keep) * denoised


@torch.no_grad()
def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Second-order multistep: a line through this and the previous prediction, taken at mid-step.

    Lu et al. 2022, algorithm 2. The first and the last step are of first order.
    """
    h_last, denoised_last = 0.0, x
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if i == 0 or sigma_next == 0:
            x = _mix(x, denoised, sigma_next / sigma)
        else:
            h = math.log(sigma / sigma_next)
            middle = denoised + (denoised - denoised_last) * (h / (2 * h_last))
            x = _mix(x, middle, sigma_next / sigma)
        if sigma_next > 0:
            h_last, denoised_last = math.log(sigma / sigma_next), denoised
        yield Step(i, sigma, sigma_next, x, denoised)


@torch.no_grad()
def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Second-order single step through the middle in lambda, then noise.

    Lu et al. 2022, algorithm 1 with r = 1/2.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        if down > 0:
            sigma_mid = math.sqrt(sigma * down)
            x_mid = _mix(x, denoised, sigma_mid / sigma)
            x = _mix(x, denoise(x_mid, sigma_mid), down / sigma)
        else:
            x = denoised
        if up:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        yield Step(i, sigma, sigma_next, x, denoised)


@torch.no_grad()
def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Iterator[Step]:
    """Second-order single step for the stochastic equation: the middle point is reached with noise, too.

    r: where in the step, measured in lambda, the second prediction is made. k-diffusion's `sample_dpmpp_sde`;
    both parts draw from one Brownian motion.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next > 0:
            sigma_mid = sigma ** (1 - r) * sigma_next**r
            down, up = ancestral_step(sigma, sigma_mid, eta)
            x_mid = _mix(x, denoised, down / sigma) + noise(sigma, sigma_mid) * (s_noise * up)
            denoised_mid = denoise(x_mid, sigma_mid)
            down, up = ancestral_step(sigma, sigma_next, eta)
            slope = (denoised_mid - denoised) / (2 * r)
            x = _mix(x, denoised + slope, down / sigma) + noise(sigma, sigma_next) * (s_noise * up)
        else:
            x = denoised
        yield Step(i, sigma, sigma_next, x, denoised)


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Iterator[Step]:
    """Second-order multistep for the stochastic equation, which shrinks x by a further factor e^(-eta h).

    solver_type: "midpoint" takes the line through two predictions at mid-step, "heun" integrates it exactly.
    k-diffusion's `sample_dpmpp_2m_sde`.
    """
    if solver_type not in ("midpoint", "heun"):
        raise SamplerError(f"solver_type must be 'midpoint' or 'heun', got {solver_type!r}")
    h_last, denoised_last = 0.0, x
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            keep = math.exp(-h * (1 + eta))
            x = _mix(x, denoised, keep)
            if i > 0:
                weight = (1 - keep) / 2 if solver_type == "midpoint" else 1 - (1 - keep) / (h * (1 + eta))
                x = x + (denoised - denoised_last) * (weight * h / h_last)
            if eta:
                x = x + noise(sigma, sigma_next) * (s_noise * _sde_noise(sigma_next, h, eta))
            h_last, denoised_last = h, denoised
        else:
            x = denoised
        yield Step(i, sigma, sigma_next, x, denoised)


@torch.no_grad()
def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Third-order multistep for the stochastic equation: a parabola through three predictions.

    k-diffusion's `sample_dpmpp_3m_sde`. phi_2 and -2 phi_3 are the integrals over a step of the exponential
    times a line and a parabola. The bend enters with phi_3, half of its due, in k-diffusion as in the
    authors' own third-order code, which leaves an error of second order with a small constant. Kept, as every
    picture made with the method has it.
    """
    past: list[tuple[float, Tensor]] = []  # (step length, prediction at its start), newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            h_eta = h * (1 + eta)
            keep = math.exp(-h_eta)
            x = _mix(x, denoised, keep)
            phi_2 = 1 - (1 - keep) / h_eta
            phi_3 = phi_2 / h_eta - 0.5
            if len(past) == 1:
                ((h_1, denoised_1),) = past
                x = x + (denoised - denoised_1) * (phi_2 * h / h_1)
            elif len(past) == 2:
                (h_1, denoised_1), (h_2, denoised_2) = past
                slope_1 = (denoised - denoised_1) * (h / h_1)
                slope_2 = (denoised_1 - denoised_2) * (h / h_2)
                bend = (slope_1 - slope_2) * (h / (h_1 + h_2))
                x = x + (slope_1 + bend * (h_1 / h)) * phi_2 - bend * phi_3
            if eta:
                x = x + noise(sigma, sigma_next) * (s_noise * _sde_noise(sigma_next, h, eta))
            past = [(h, denoised), *past[:1]]
        else:
            x = denoised
        yield Step(i, sigma, sigma_next, x, denoised)


def _sde_noise(sigma_next: float, h: float, eta: float) -> float:
    """The standard deviation of what a stochastic step of length h adds to x."""
    return sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
