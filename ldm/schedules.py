"""The noise levels a network was trained on, and the levels that a run visits.

Everything here is float64 on the CPU: a schedule is a thousand numbers, and a picture depends on them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from ldm.compat import StrengthRule
from ldm.errors import RequestError
from ldm.spacings import SPACINGS, Kind, ddim_original, log_linear, spacing_name


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels a network was trained on, one for each training step t = 0 .. T-1.

    sigmas: ascending and positive; the standard deviation of the noise relative to the picture,
        sigma_t = sqrt((1 - abar_t) / abar_t), abar being the cumulated product of 1 - beta.

    The diffusion x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise of Ho et al. 2020 (arXiv:2006.11239, eq. 4)
    is x_0 + sigma_t noise, scaled by sqrt(abar_t) = 1 / sqrt(1 + sigma_t^2). The second, variance-exploding
    form is the one that all samplers here work in (Karras et al. 2022, arXiv:2206.00364, appendix B).
    """

    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 < low < high for low, high in pairwise((*self.sigmas, math.inf))):
            raise RequestError("the sigmas of a noise schedule must be positive, finite and ascending")

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | np.ndarray) -> "NoiseSchedule":
        """From the cumulated products abar_t, descending in (0, 1)."""
        abar = np.asarray(alphas_cumprod, dtype=np.float64)
        return cls(tuple(np.sqrt((1 - abar) / abar).tolist()))

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray) -> "NoiseSchedule":
        """From the variances beta_t that each training step adds."""
        return cls.from_alphas_cumprod(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> "NoiseSchedule":
        """sqrt(beta) is linear in t: all of Stable Diffusion. CompVis calls it "linear"."""
        return cls.from_betas(np.linspace(start**0.5, end**0.5, steps) ** 2)

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 2e-2, steps: int = 1000) -> "NoiseSchedule":
        """beta is linear in t. Ho et al. 2020, section 4. CompVis calls it "sqrt_linear"."""
        return cls.from_betas(np.linspace(start, end, steps))

    @classmethod
    def sqrt(cls, start: float = 1e-4, end: float = 2e-2, steps: int = 1000) -> "NoiseSchedule":
        """beta^2 is linear in t (CompVis)."""
        return cls.from_betas(np.linspace(start, end, steps) ** 0.5)

    @classmethod
    def cosine(cls, offset: float = 8e-3, steps: int = 1000) -> "NoiseSchedule":
        """abar falls as a squared cosine. Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17."""
        abar = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls.from_betas(np.clip(1 - abar[1:] / abar[:-1], 0, 0.999))

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """The same schedule, stretched until the last level holds nothing of the picture.

        Lin et al. 2023, arXiv:2305.08891, algorithm 1: sqrt(abar) is shifted and scaled so that it ends at 0
        and its first value stays. An infinite sigma cannot be computed with, so the last abar is the tiny
        number used by ComfyUI and Forge instead, which is sigma = 4518.8.
        """
        root = np.sqrt(self.alphas_cumprod)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        abar[-1] = 4.8973451890853435e-08
        return self.from_alphas_cumprod(abar)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, (T,), descending."""
        return 1 / (1 + np.square(self.sigmas))

    @property
    def sigma_min(self) -> float:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> float:
        return self.sigmas[-1]

    @cached_property
    def _steps(self) -> np.ndarray:
        return np.arange(len(self.sigmas))

    @cached_property
    def _log_sigmas(self) -> np.ndarray:
        return np.log(self.sigmas)

    def sigma(self, t: float) -> float:
        """The noise level at a training step, which may be fractional: linear in log sigma, clamped."""
        return math.exp(np.interp(t, self._steps, self._log_sigmas))

    def t(self, sigma: float) -> float:
        """The fractional training step of a noise level, clamped to 0 .. T-1: the inverse of `sigma`."""
        if sigma <= self.sigma_min:
            return 0.0
        return float(np.interp(math.log(sigma), self._log_sigmas, self._steps))


def sigmas(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str | Sequence[float] = "uniform",
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
    discard_penultimate: bool = False,
) -> list[float]:
    """The noise levels of a run: `steps` + 1 numbers, strictly decreasing, the last one 0.

    spacing: a name of `ldm.spacings.SPACINGS`, or descending levels of your own, with or without the final 0.
        A list of another length is interpolated, linearly in log sigma, to the number of steps.
    sigma_min, sigma_max: replace the ends of the network's own range; levels beyond that range are not
        reached by spacings that count in training steps.
    rho: bends `karras` (7) and `polyexponential` (1).
    discard_penultimate: make one step more and leave out the last level before 0. DPM2 and a few others waste
        their last step on it otherwise (web UI).
    Raises RequestError for numbers that make no schedule, SamplerError for an unknown spacing.
    """
    if steps < 1:
        raise RequestError(f"steps must be at least 1, got {steps}")
    n = steps + discard_penultimate
    low = schedule.sigma_min if sigma_min is None else sigma_min
    high = schedule.sigma_max if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise RequestError(f"need 0 < sigma_min < sigma_max, got sigma_min {low:g} and sigma_max {high:g}")
    if rho is not None and not 0 < rho < math.inf:
        raise RequestError(f"rho must be positive, got {rho:g}")

    if isinstance(spacing, str):
        name = spacing_name(spacing)
        check_overrides(name, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
        levels = _levels(schedule, n, name, low, high, rho)
    else:
        levels = _custom(spacing, n)

    if discard_penultimate:
        levels = levels[:-1]
    if not all(a > b for a, b in pairwise([*levels, 0.0])):
        raise RequestError(f"the spacing {spacing!r} has no {steps} different levels; ask for fewer steps")
    return [*levels, 0.0]


def check_overrides(
    name: str, *, sigma_min: float | None, sigma_max: float | None, rho: float | None
) -> None:
    """Raise RequestError if a spacing, by its name in SPACINGS, has no ends or no rho to choose."""
    spacing = SPACINGS[name]
    if spacing.kind is Kind.TABLE and (sigma_min, sigma_max) != (None, None):
        raise RequestError(
            f"the spacing {name!r} has fixed ends; use 'karras' to choose sigma_min or sigma_max"
        )
    if rho is not None and not spacing.takes_rho:
        raise RequestError(f"the spacing {name!r} has no rho; it belongs to 'karras' and 'polyexponential'")


def ddim_levels(schedule: NoiseSchedule, steps: int, rule: Literal["compvis", "webui"]) -> list[float]:
    """The levels of DDIM and PLMS as other programs have them, ending above 0: a trace of noise stays.

    CompVis goes on from the last training step visited, 1, to 0. The web UI ends at 1, without evaluating the
    network there, so it makes one step less. `ldm.samplers.Sampler.finish` scales what they leave.
    """
    times = ddim_original(steps, len(schedule.sigmas))
    return [schedule.sigma(t) for t in ([*times, 0.0] if rule == "compvis" else times)]


def part_of_run(steps: int, strength: float, rule: StrengthRule) -> tuple[int, int]:
    """Image to image: the length of the whole schedule, and how many of its last steps are made.

    strength: above 0, to 1. The same number gives one step more in the web UI than in diffusers.
        webui: int(strength * steps) + 1 of `steps`, strength counting as at most 0.999
        diffusers: int(strength * steps) of `steps`, but at least one
        exact: `steps` of so many that they are this share (ComfyUI, and the web UI's "exactly the amount")
    """
    if rule == "diffusers":
        return steps, max(int(strength * steps), 1)
    capped = min(strength, 0.999)
    if rule == "exact":
        return int(steps / capped), steps
    return steps, int(capped * steps) + 1


def _levels(
    schedule: NoiseSchedule, n: int, name: str, low: float, high: float, rho: float | None
) -> list[float]:
    """The n levels of a named spacing."""
    spacing = SPACINGS[name]
    if spacing.kind is Kind.LEVEL:
        return spacing.function(n, low, high) if rho is None else spacing.function(n, low, high, rho)
    if spacing.kind is Kind.TABLE:
        return spacing.function(n)
    # Training steps are stretched to the range asked for, which is 0 .. T-1 unless it was overridden.
    last = len(schedule.sigmas) - 1
    bottom, top = schedule.t(low), schedule.t(high)
    return [schedule.sigma(bottom + t * (top - bottom) / last) for t in spacing.function(n, last + 1)]


def _custom(levels: Sequence[float], n: int) -> list[float]:
    """The n levels of a list given by the user."""
    given = [float(level) for level in levels]
    if given and given[-1] == 0:
        given.pop()
    if not given or not all(math.inf > a > b for a, b in pairwise([*given, 0.0])):
        raise RequestError(
            "a list of sigmas must be finite and strictly decreasing, with at least one above 0"
        )
    return given if len(given) == n else log_linear(given, n)
