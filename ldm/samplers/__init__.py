"""Samplers by the names that people know, and how to read those names.

A sampler is a generator `function(denoise, x, sigmas, noise, **options)` that yields a `Step` after each
update. It works on x = picture + sigma * noise and knows nothing of networks, prompts or devices.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from ldm import schedules
from ldm.denoise import Denoise
from ldm.errors import SamplerError
from ldm.formats.mapped import printable
from ldm.noise import Noise
from ldm.samplers import ddim, dpm2, dpm_solver, dpmpp, euler, heun, lcm, multistep, restart, unipc
from ldm.samplers.step import Step
from ldm.spacings import PLAIN_NAMES, plain, spacing_name

__all__ = ["SAMPLERS", "Sampler", "Step", "parse"]


@dataclass(frozen=True)
class Sampler:
    """A sampling method, and the settings that people expect with its name."""

    name: str
    function: Callable[..., Iterator[Step]]
    spacing: str = "uniform"  # of `ldm.spacings.SPACINGS`, when the user names none
    evaluations: int = 1  # of the network per step; a first or last step may differ
    orders: tuple[int, ...] = ()  # what its option `order` may be
    brownian: bool = False  # draws its noise from a `BrownianNoise`
    discard_penultimate: bool = False  # leaves out the last level above 0, see `ldm.schedules.sigmas`
    stops_early: bool = False  # at the last level above 0, see `ldm.samplers.dpm_solver`
    unit_start: bool = False  # starts from noise of the variance of a noised picture, see `start`
    aliases: tuple[str, ...] = ()  # further names, beside all spellings of `name`

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """The options of the method with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def sigmas(
        self,
        schedule: schedules.NoiseSchedule,
        steps: int,
        spacing: str | Sequence[float] | None = None,
        **overrides: float | None,
    ) -> list[float]:
        """The levels of a run, see `ldm.schedules.sigmas`; spaced as people expect unless told otherwise."""
        return schedules.sigmas(
            schedule,
            steps,
            self.spacing if spacing is None else spacing,
            discard_penultimate=self.discard_penultimate,
            **overrides,  # pyright: ignore[reportArgumentType]
        )

    def start(self, noise: Tensor, sigma: float) -> Tensor:
        """The state in which a run from pure noise starts: unit noise, the first level -> x.

        k-diffusion starts at sigma * noise, the limit for large sigma. The older samplers think in the
        variance-preserving scale and start there from unit noise, which is sqrt(1 + sigma^2) * noise in ours.
        """
        return noise * (math.sqrt(1 + sigma**2) if self.unit_start else sigma)

    def finish(self, x: Tensor, sigma: float) -> Tensor:
        """The latent of a run that ended at `sigma`, where that is above 0: `start` the other way round."""
        return x / math.sqrt(1 + sigma**2) if self.unit_start else x

    def __call__(
        self, denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, **options: Any
    ) -> Iterator[Step]:
        """Run. Options as in `check_options`."""
        self.check_options(options)
        return self.function(denoise, x, sigmas, noise, **options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise SamplerError if the method does not have one of these options, or not with that order."""
        for name in options:
            if name not in self.options:
                known = f"it has {', '.join(self.options)}" if self.options else "it has none"
                raise SamplerError(f"the sampler {self.name!r} has no option {name!r}; {known}")
        if "order" in options and options["order"] not in self.orders:
            orders = ", ".join(map(str, self.orders))
            raise SamplerError(f"the order of {self.name} must be one of {orders}, got {options['order']}")


_SAMPLERS = (
    Sampler("DPM++ 2M", dpmpp.dpmpp_2m, "karras"),
    Sampler("DPM++ SDE", dpmpp.dpmpp_sde, "karras", evaluations=2, brownian=True),
    Sampler("DPM++ 2M SDE", dpmpp.dpmpp_2m_sde, "exponential", brownian=True),
    Sampler(
        "DPM++ 2M SDE Heun", partial(dpmpp.dpmpp_2m_sde, solver_type="heun"), "exponential", brownian=True
    ),
    Sampler("DPM++ 2S a", dpmpp.dpmpp_2s_ancestral, "karras", evaluations=2, aliases=("dpmpp_2s_ancestral",)),
    Sampler("DPM++ 3M SDE", dpmpp.dpmpp_3m_sde, "exponential", brownian=True, discard_penultimate=True),
    Sampler("Euler a", euler.euler_ancestral, aliases=("euler_ancestral",)),
    Sampler("Euler", euler.euler),
    Sampler("LMS", multistep.lms, orders=(1, 2, 3, 4)),
    Sampler("Heun", heun.heun, evaluations=2),
    Sampler("DPM2", dpm2.dpm_2, "karras", evaluations=2, discard_penultimate=True),
    Sampler(
        "DPM2 a",
        dpm2.dpm_2_ancestral,
        "karras",
        evaluations=2,
        discard_penultimate=True,
        aliases=("dpm_2_ancestral",),
    ),
    # The web UI runs these two with eta 1, the papers and k-diffusion with 0.
    Sampler("DPM fast", partial(dpm_solver.dpm_fast, eta=1.0), stops_early=True),
    Sampler(
        "DPM adaptive",
        partial(dpm_solver.dpm_adaptive, eta=1.0),
        evaluations=3,
        orders=(2, 3),
        stops_early=True,
        aliases=("dpm_ad",),
    ),
    Sampler("Restart", restart.restart, "karras", evaluations=2),
    Sampler("DDIM", ddim.ddim, "ddim_uniform", unit_start=True),
    Sampler("DDPM", ddim.ddpm, unit_start=True),
    Sampler("PLMS", multistep.plms, "ddim_uniform", unit_start=True, aliases=("pndm",)),
    Sampler("UniPC", unipc.unipc, "sgm_uniform", orders=(1, 2, 3), unit_start=True),
    Sampler(
        "UniPC BH2",
        partial(unipc.unipc, variant="bh2"),
        "sgm_uniform",
        orders=(1, 2, 3),
        unit_start=True,
    ),
    Sampler("DEIS", multistep.deis, "karras", orders=(1, 2, 3, 4)),
    Sampler("IPNDM", multistep.ipndm, orders=(1, 2, 3, 4)),
    Sampler("IPNDM V", multistep.ipndm_v, orders=(1, 2, 3, 4)),
    Sampler("HeunPP2", heun.heunpp2, evaluations=3),
    Sampler("LCM", lcm.lcm, "turbo"),
)

SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _SAMPLERS}


def parse(name: str, schedule: str | None = None) -> tuple[Sampler, str]:
    """A sampler and a spacing from a name such as "DPM++ 2M Karras", "euler_ancestral" or "k_dpm_2_a".

    Capitals, spaces, hyphens and underscores do not matter. Where the name holds no spacing, it is the
    sampler's own. schedule: takes the place of what the name says; "automatic" is the sampler's own.
    Raises SamplerError with suggestions if a name is unknown.
    """
    if schedule is not None:
        sampler = parse(name)[0]
        return sampler, sampler.spacing if plain(schedule) == AUTOMATIC else spacing_name(schedule)
    bare = _plain(name)
    for suffix, spacing in (("", ""), *_SUFFIXES):
        sampler = _BY_PLAIN_NAME.get(bare.removesuffix(suffix))
        if sampler and bare.endswith(suffix):
            return sampler, spacing or sampler.spacing
    guesses = get_close_matches(bare, _BY_PLAIN_NAME, n=3, cutoff=0.5)
    names = ", ".join(dict.fromkeys(_BY_PLAIN_NAME[guess].name for guess in guesses))
    hint = f"did you mean {names}?" if names else f"choose {', '.join(list(SAMPLERS)[:8])}, ..."
    raise SamplerError(f"unknown sampler {printable(name)!r}; {hint}")


def settings(name: str) -> dict[str, str]:
    """The fields of a request that a sampler's name sets: the schedule too if the name says it.

    "DPM++ 2M Karras" -> {"sampler": "DPM++ 2M", "schedule": "karras"}. Raises SamplerError as `parse`.
    """
    sampler, spacing = parse(name)
    return {"sampler": sampler.name} | ({} if _plain(name) in _BY_PLAIN_NAME else {"schedule": spacing})


def _plain(name: str) -> str:
    """A name without prefix and spelling: "DPM++ 2M", "k_dpmpp_2m", "sample_dpmpp_2m" -> "dpmpp2m"."""
    return plain(name.strip().lower().replace("++", "pp").removeprefix("sample_").removeprefix("k_"))


_BY_PLAIN_NAME = {_plain(name): s for s in SAMPLERS.values() for name in (s.name, *s.aliases)}
AUTOMATIC = "automatic"  # the web UI's word for a sampler's own schedule
# The longest first, as "SGM Uniform" ends in "Uniform".
_SUFFIXES = sorted([*PLAIN_NAMES.items(), (AUTOMATIC, "")], key=lambda item: -len(item[0]))
