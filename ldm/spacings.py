"""How the steps of a sampler are spread over the noise levels.

A spacing answers one question: given N steps, which N levels does a run visit before it ends at 0? There are
three kinds, told apart by what they are made of:

- TIME: fractional training steps from T - 1 downwards. The levels follow from the network's own schedule.
- LEVEL: a formula between the lowest and the highest sigma.
- TABLE: fixed numbers, tuned for the Stable Diffusion schedule.

`ldm.schedules.sigmas` turns all three into sigmas. Names and labels are those of the AUTOMATIC1111 web UI.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from functools import partial
from math import atan, exp, lgamma

import numpy as np

from ldm.errors import SamplerError
from ldm.formats.mapped import printable


class Kind(Enum):
    TIME = "f(n, steps) -> n training steps in [0, steps - 1], descending"
    LEVEL = "f(n, low, high) -> n sigmas in [low, high], descending"
    TABLE = "f(n) -> n sigmas, descending"


@dataclass(frozen=True)
class Spacing:
    label: str  # as people and PNG files spell it
    kind: Kind
    function: Callable[..., list[float]]
    takes_rho: bool = False  # the function has a fourth argument that bends the curve


# Spacings in training time. `steps` is the T of the schedule, usually 1000.


def uniform(n: int, steps: int) -> list[float]:
    """Equal strides from T - 1 to 0, both included (k-diffusion's `get_sigmas`)."""
    return np.linspace(steps - 1, 0, n).tolist()


def sgm_uniform(n: int, steps: int) -> list[float]:
    """Equal strides from T - 1 in which 0 would be the (n+1)th (Stability-AI/generative-models).

    UniPC's `time_uniform` visits the same levels.
    """
    return np.linspace(steps - 1, 0, n + 1)[:-1].tolist()


def simple(n: int, steps: int) -> list[float]:
    """Whole training steps, every T/n-th from the top (ComfyUI)."""
    return [float(steps - 1 - int(i * steps / n)) for i in range(n)]


def ddim_uniform(n: int, steps: int) -> list[float]:
    """Whole training steps 1, 1 + T/n, 1 + 2T/n ..., the "leading" rule of the original DDIM.

    The original takes the whole part of T/n as stride, which gives more than n steps, or steps beyond the
    table, when n does not divide T. Rounding each multiple instead gives n steps for every n up to T, and the
    same ones where n divides T. The offset 1 is the original's; n = T has no room for it. A single step would
    start at t = 1, at hardly any noise, and draw nothing: it starts at the top instead.

    Song et al. 2020, arXiv:2010.02502; CompVis/latent-diffusion.
    """
    if n == 1:
        return [float(steps - 1)]
    offset = 1 if n < steps else 0
    return [float(i * steps // n + offset) for i in reversed(range(n))]


def ddim_original(n: int, steps: int) -> list[float]:
    """Whole training steps 1, 1 + s, 1 + 2s ... with the whole part of T/n as stride s: the original rule.

    More than n steps where n does not divide T. The highest may lie just beyond the table, as for n = 3 and
    27 of T = 1000, where the original fails; it is drawn in here, as in the web UI.
    """
    times = {min(t + 1, steps - 1) for t in range(0, steps, max(steps // n, 1))}
    return [float(t) for t in sorted(times, reverse=True)]


def trailing(n: int, steps: int) -> list[float]:
    """Whole training steps T - 1, T - 1 - T/n ..., so that the first is always at the top.

    Lin et al. 2023, arXiv:2305.08891, table 2. The web UI calls it "turbo", after the few-step SDXL Turbo.
    """
    return [float(round((n - i) * steps / n - 1)) for i in range(n)]


def beta_timesteps(n: int, steps: int) -> list[float]:
    """Quantiles of the beta distribution as training steps, which is what ComfyUI calls "beta".

    ComfyUI rounds to whole steps and drops the doubles; here they stay fractional, so that n steps are n.
    Lee et al. 2024, arXiv:2407.12173.
    """
    levels = np.linspace(1, 0, n + 1)[:-1]
    return (beta_quantiles(levels) * (steps - 1)).tolist()


# Spacings between the lowest and the highest sigma.


def karras(n: int, low: float, high: float, rho: float = 7.0) -> list[float]:
    """Equal strides in sigma^(1/rho). Karras et al. 2022, arXiv:2206.00364, eq. 5."""
    return (np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho).tolist()


def exponential(n: int, low: float, high: float) -> list[float]:
    """Equal strides in log sigma."""
    return np.geomspace(high, low, n).tolist()


def polyexponential(n: int, low: float, high: float, rho: float = 1.0) -> list[float]:
    """A polynomial of degree rho in log sigma; rho = 1 is `exponential` (k-diffusion)."""
    return (low * (high / low) ** np.linspace(1, 0, n) ** rho).tolist()


def kl_optimal(n: int, low: float, high: float) -> list[float]:
    """Equal strides in the angle whose tangent is sigma. Sabour et al. 2024, arXiv:2404.14507, section 3.2.

    The web UI ends this one at `low` instead of 0, which leaves a trace of noise in the picture.
    """
    return np.tan(np.linspace(atan(high), atan(low), n + 1)[:-1]).tolist()


def beta(n: int, low: float, high: float) -> list[float]:
    """Quantiles of the beta distribution, linear in sigma as in the web UI (see also `beta_timesteps`).

    Lee et al. 2024, arXiv:2407.12173.
    """
    return (low + beta_quantiles(np.linspace(1, 0, n)) * (high - low)).tolist()


def beta_quantiles(levels: np.ndarray, a: float = 0.6) -> np.ndarray:
    """The x in [0, 1] below which Beta(a, a) has the probabilities `levels`; 0.6 is the web UI's default.

    The distribution function is the series x^a (1-x)^a / (a B(a, a)) * sum_k (2a)_k / (a+1)_k x^k (DLMF
    8.17.8). By symmetry only x <= 1/2 is needed, where 60 terms reach the precision of a float; x is then
    found by bisection.
    """
    target = np.minimum(levels, 1 - levels)
    low, high = np.zeros_like(target), np.full_like(target, 0.5)
    for _ in range(80):
        x = (low + high) / 2
        term, series = np.ones_like(x), np.ones_like(x)
        for k in range(60):
            term = term * x * (2 * a + k) / (a + 1 + k)
            series = series + term
        scale = exp(lgamma(2 * a) - 2 * lgamma(a)) / a
        below = scale * (x * (1 - x)) ** a * series < target
        low, high = np.where(below, x, low), np.where(below, high, x)
    return np.where(levels < 0.5, low, 1 - low)


# Spacings that are lists of numbers.


def vp(n: int) -> list[float]:
    """The continuous variance-preserving schedule: beta from 0.1 to 20, t from 1 to 0.001.

    Song et al. 2021, arXiv:2011.13456, eq. 33; Karras et al. 2022, table 1.
    """
    t = np.linspace(1, 1e-3, n)
    return np.sqrt(np.expm1(19.9 * t**2 / 2 + 0.1 * t)).tolist()


def log_linear(table: Sequence[float], n: int) -> list[float]:
    """n levels along a table of descending positive sigmas, interpolated linearly in log sigma."""
    places = np.linspace(0, len(table) - 1, n)
    return np.exp(np.interp(places, range(len(table)), np.log(table))).tolist()


# Align Your Steps: Sabour et al. 2024, arXiv:2404.14507, from the numbers on the authors' project page.
AYS_SD1 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
# GITS: Chen et al. 2024, arXiv:2405.11326, as tabulated by the web UI.
GITS_SD1 = (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029)
GITS_SDXL = (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029)


SPACINGS: dict[str, Spacing] = {
    "uniform": Spacing("Uniform", Kind.TIME, uniform),
    "karras": Spacing("Karras", Kind.LEVEL, karras, takes_rho=True),
    "exponential": Spacing("Exponential", Kind.LEVEL, exponential),
    "polyexponential": Spacing("Polyexponential", Kind.LEVEL, polyexponential, takes_rho=True),
    "sgm_uniform": Spacing("SGM Uniform", Kind.TIME, sgm_uniform),
    "kl_optimal": Spacing("KL Optimal", Kind.LEVEL, kl_optimal),
    "align_your_steps": Spacing("Align Your Steps", Kind.TABLE, partial(log_linear, AYS_SD1)),
    "align_your_steps_sdxl": Spacing("Align Your Steps SDXL", Kind.TABLE, partial(log_linear, AYS_SDXL)),
    "gits": Spacing("Align Your Steps GITS", Kind.TABLE, partial(log_linear, GITS_SD1)),
    "gits_sdxl": Spacing("Align Your Steps GITS SDXL", Kind.TABLE, partial(log_linear, GITS_SDXL)),
    "simple": Spacing("Simple", Kind.TIME, simple),
    "normal": Spacing("Normal", Kind.TIME, uniform),  # ComfyUI's name for the same strides
    "ddim_uniform": Spacing("DDIM", Kind.TIME, ddim_uniform),
    "beta": Spacing("Beta", Kind.LEVEL, beta),
    "beta_timesteps": Spacing("Beta timesteps", Kind.TIME, beta_timesteps),
    "turbo": Spacing("Turbo", Kind.TIME, trailing),
    "vp": Spacing("VP", Kind.TABLE, vp),
}

# Other names in circulation: "ddim" is the web UI's key, "trailing" the one of diffusers.
ALIASES = {"ddim": "ddim_uniform", "trailing": "turbo", "ka": "karras"}


def plain(name: str) -> str:
    """A name without what people write in different ways: "SGM Uniform", "sgm-uniform" -> "sgmuniform"."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


PLAIN_NAMES: dict[str, str] = {
    **{plain(text): key for key, spacing in SPACINGS.items() for text in (key, spacing.label)},
    **ALIASES,
}


def spacing_name(name: str) -> str:
    """The key in SPACINGS for any spelling of it. Raises SamplerError with a suggestion if there is none."""
    key = PLAIN_NAMES.get(plain(name))
    if key is None:
        guess = get_close_matches(plain(name), PLAIN_NAMES, n=1)
        usual = ", ".join(list(SPACINGS)[:6])
        hint = f"did you mean {PLAIN_NAMES[guess[0]]!r}?" if guess else f"choose {usual}, ..."
        raise SamplerError(f"unknown spacing {printable(name)!r}; {hint}")
    return key
