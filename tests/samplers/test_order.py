"""Each deterministic method has its order: with half the step, the error falls by 2 to that power.

Two problems with exact solutions, in float64:

- Gaussian data, whose ideal denoiser and ODE have closed forms.
- A picture that depends on sigma alone and comes in smoothly on the way. There the first steps, which a
  multistep method makes with a lower order, are exact, so that its own order shows.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.samplers import dpm2, dpm_solver, dpmpp, euler, heun, multistep, unipc
from ldm.spacings import karras
from tests.samplers.toy import last

HIGH, LOW = 8.0, 0.2
MEAN, STD = 0.4, 0.7
START = 9.0


def no_noise(sigma: float, sigma_next: float) -> Tensor:
    return torch.zeros(1)


def gaussian_error(sampler: Callable, levels: Sequence[float]) -> float:
    """For data N(MEAN, STD^2), x - MEAN follows sqrt(STD^2 + sigma^2)."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return (MEAN * sigma**2 + x * STD**2) / (STD**2 + sigma**2)

    low, high = levels[-2] if levels[-1] == 0 else levels[-1], levels[0]
    exact = MEAN + (START - MEAN) * math.hypot(STD, low) / math.hypot(STD, high)
    x = torch.full((1, 1, 1, 1), START, dtype=torch.float64)
    return abs(last(sampler(denoise, x, levels, no_noise)).item() - exact)


def onset_error(sampler: Callable, levels: Sequence[float]) -> float:
    """For denoised = f(sigma), x / sigma is START / HIGH plus the integral of f / sigma^2 up to HIGH."""
    onset = 3.0

    def picture(sigma: np.ndarray | float) -> np.ndarray:
        return np.maximum(0.0, 1 - np.asarray(sigma) / onset) ** 7 * np.cos(3 * np.asarray(sigma))

    points, shares = np.polynomial.legendre.leggauss(200)
    sigma = LOW + (onset - LOW) * (points + 1) / 2
    integral = float(shares @ (picture(sigma) / sigma**2)) * (onset - LOW) / 2
    exact = LOW * (START / HIGH + integral)
    x = torch.full((1, 1, 1, 1), START, dtype=torch.float64)
    result = last(sampler(lambda x, sigma: torch.full_like(x, float(picture(sigma))), x, levels, no_noise))
    return abs(result.item() - exact)


def observed_order(error: Callable, sampler: Callable, spacing: Callable, steps: int) -> float:
    coarse, fine = (error(sampler, spacing(n + 1, LOW, HIGH)) for n in (steps, 2 * steps))
    return math.log2(coarse / fine)


ONE_STEP = {
    "euler": (euler.euler, 1),
    "euler_ancestral without noise": (partial(euler.euler_ancestral, eta=0.0), 1),
    # Its weights depend on the run, not on the step.
    "heunpp2": (heun.heunpp2, 1),
    "heun": (heun.heun, 2),
    "dpm_2": (dpm2.dpm_2, 2),
    "dpm_2_ancestral without noise": (partial(dpm2.dpm_2_ancestral, eta=0.0), 2),
    "dpmpp_2s_ancestral without noise": (partial(dpmpp.dpmpp_2s_ancestral, eta=0.0), 2),
    "dpmpp_sde without noise": (partial(dpmpp.dpmpp_sde, eta=0.0), 2),
    # These two start with a step of first order, which costs one error of second order.
    "dpmpp_2m": (dpmpp.dpmpp_2m, 2),
    "dpmpp_2m_sde without noise": (partial(dpmpp.dpmpp_2m_sde, eta=0.0), 2),
    "dpmpp_2m_sde heun without noise": (partial(dpmpp.dpmpp_2m_sde, eta=0.0, solver_type="heun"), 2),
    # As published, see its docstring: of second order in spite of its name.
    "dpmpp_3m_sde without noise": (partial(dpmpp.dpmpp_3m_sde, eta=0.0), 2),
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_order_on_gaussian_data(name: str):
    sampler, order = ONE_STEP[name]
    assert observed_order(gaussian_error, sampler, karras, 160) == pytest.approx(order, abs=0.1)


MULTISTEP = {
    **{f"lms {p}": (partial(multistep.lms, order=p), p) for p in (1, 2, 3, 4)},
    **{f"deis {p}": (partial(multistep.deis, order=p), p) for p in (1, 2, 3, 4)},
    # The corrector raises the order of the predictor by one.
    **{
        f"unipc {variant} {p}": (
            partial(unipc.unipc, order=p, variant=variant, lower_order_final=False),
            p + 1,
        )
        for variant in ("bh1", "bh2", "vary_coeff")
        for p in (1, 2, 3)
    },
}


@pytest.mark.parametrize("name", MULTISTEP)
def test_order_of_multistep_methods(name: str):
    sampler, order = MULTISTEP[name]
    assert observed_order(onset_error, sampler, karras, 160) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("sampler", [multistep.ipndm, multistep.plms])
def test_ipndm_and_plms_are_fourth_order_with_equal_steps(sampler: Callable):
    def equal(n: int, low: float, high: float) -> list[float]:
        return np.linspace(high, low, n).tolist()

    assert observed_order(onset_error, sampler, equal, 2000) > 3.8


@pytest.mark.parametrize("sampler", [multistep.ipndm, multistep.plms])
def test_ipndm_and_plms_are_second_order_with_unequal_steps(sampler: Callable):
    assert observed_order(onset_error, sampler, karras, 160) == pytest.approx(2, abs=0.1)


def test_dpm_fast_is_third_order():
    """With n = 3 k + 2 evaluations: k steps of third order and one of second, whose error is of third."""
    coarse, fine = (
        gaussian_error(dpm_solver.dpm_fast, [HIGH] * (n - 1) + [LOW, 0.0]) for n in (3 * 20 + 2, 3 * 40 + 2)
    )
    assert math.log2(coarse / fine) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_keeps_its_tolerance(order: int):
    """A hundredfold smaller tolerance makes the error at least thirtyfold smaller."""
    loose, tight = (
        gaussian_error(partial(dpm_solver.dpm_adaptive, order=order, rtol=t, atol=t), [HIGH, LOW, 0.0])
        for t in (1e-3, 1e-5)
    )
    assert tight < loose / 30
    assert loose < 1e-3 * START
