"""What holds for every sampler by its name, and how names are read."""

import math
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.errors import NotFiniteError, SamplerError
from ldm.noise import BrownianNoise, GaussianNoise, Noise
from ldm.samplers import SAMPLERS, Sampler, parse
from ldm.schedules import NoiseSchedule
from ldm.spacings import SPACINGS
from tests.samplers.toy import Counted

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (4, 8, 8)
OWN_LEVELS = ("DPM fast", "DPM adaptive")  # take only the ends of the levels they are given

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def gaussians(means: list[float]) -> Denoise:
    """The ideal denoiser of Gaussian data with its own mean for each image of the batch.

    Its arithmetic is exact or correctly rounded, whatever the size of the batch.
    """

    def denoise(x: Tensor, sigma: float) -> Tensor:
        mean = torch.tensor(means, dtype=x.dtype).view(-1, 1, 1, 1)
        assert len(x) == len(means)
        return (mean * sigma**2 + x * 0.25) / (0.25 + sigma**2)

    return denoise


def start(sampler: Sampler, seeds: list[int], sigmas: list[float]) -> tuple[Tensor, Noise]:
    """Where a run from these seeds starts, and the noise that it goes on with."""
    gaussian = GaussianNoise(SHAPE, seeds)
    x = sampler.start(gaussian.draw(), sigmas[0])
    return x, BrownianNoise(SHAPE, seeds, sigmas[-2], sigmas[0]) if sampler.brownian else gaussian


def options(sampler: Sampler) -> dict[str, float]:
    """Such that every sampler that can draw noise does so."""
    return {name: value for name, value in (("s_churn", 5.0), ("eta", 0.8)) if name in sampler.options}


@every_sampler
def test_a_batch_equals_single_runs_bit_for_bit(sampler: Sampler):
    seeds, means = [3, 14, 15], [0.0, 0.5, -2.0]
    sigmas = sampler.sigmas(SCHEDULE, 22)  # enough for a restart
    x, noise = start(sampler, seeds, sigmas)
    *_, batch = sampler(gaussians(means), x, sigmas, noise, **options(sampler))
    for i, (seed, mean) in enumerate(zip(seeds, means, strict=True)):
        x, noise = start(sampler, [seed], sigmas)
        *_, single = sampler(gaussians([mean]), x, sigmas, noise, **options(sampler))
        assert torch.equal(batch.x[i], single.x[0])
        assert torch.equal(batch.denoised[i], single.denoised[0])


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 25])
def test_a_run_of_any_length_works(sampler: Sampler, steps: int):
    """It stays in float32, leaves the caller's x alone, and counts its steps."""
    sigmas = sampler.sigmas(SCHEDULE, steps)
    x, noise = start(sampler, [7], sigmas)
    before = x.clone()
    run = list(sampler(gaussians([0.3]), x, sigmas, noise, **options(sampler)))
    assert torch.equal(x, before)
    assert [step.index for step in run] == list(range(len(run)))
    assert run[0].sigma == sigmas[0]
    for step in run:
        assert step.x.dtype == step.denoised.dtype == torch.float32
        assert step.x.shape == step.denoised.shape == x.shape
        assert step.x.isfinite().all()
    if sampler.name not in OWN_LEVELS:
        assert len(run) == steps
        assert run[-1].sigma_next == 0


@every_sampler
def test_a_run_draws_the_data(sampler: Sampler):
    """From levels of every sampler's own choice to the mean and the spread of Gaussian data."""
    sigmas = sampler.sigmas(SCHEDULE, 60)
    x, noise = start(sampler, [1], sigmas)
    *_, step = sampler(gaussians([0.3]), x, sigmas, noise)
    # 256 numbers: four standard errors of their mean and of their spread, and 15 % for the method.
    assert step.x.mean().item() == pytest.approx(0.3, abs=4 * 0.5 / 16 + 0.05)
    if sampler.name != "LCM":  # which is made for another kind of network
        assert step.x.std().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(512) + 0.075)


@every_sampler
def test_evaluations_per_step_are_as_stated(sampler: Sampler):
    sigmas = sampler.sigmas(SCHEDULE, 30)
    x, noise = start(sampler, [1], sigmas)
    denoise = Counted(gaussians([0.0]))
    steps = len(list(sampler(denoise, x, sigmas, noise)))
    if sampler.name == "DPM adaptive":
        assert len(denoise.levels) >= sampler.evaluations * steps  # more where a step was refused
    elif sampler.name == "DPM fast":
        assert len(denoise.levels) == 30  # shared between fewer, longer steps
    else:
        assert abs(len(denoise.levels) - sampler.evaluations * steps) <= 3  # at the ends of a run
    assert min(denoise.levels) > 0


@every_sampler
def test_grad_mode_does_not_leak_out_of_a_run(sampler: Sampler):
    sigmas = sampler.sigmas(SCHEDULE, 3)
    x, noise = start(sampler, [1], sigmas)
    scale = torch.tensor(1.0, requires_grad=True)
    denoise = gaussians([0.0])
    for step in sampler(lambda x, sigma: denoise(x, sigma) * scale, x, sigmas, noise):
        assert torch.is_grad_enabled()
        assert not step.x.requires_grad


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("DDIM", {}, range(1, 1001)),
        ("PLMS", {}, range(1, 1001)),
        # Its order changes the ends of a run alone, and solving for the weights of order 3 takes time.
        ("UniPC", {"order": 1}, range(1, 1001)),
        ("UniPC", {}, [*range(1, 40), 333, 999, 1000]),
    ],
)
def test_exactly_n_steps_for_every_n(name: str, options: dict[str, int], counts: Iterable[int]):
    """Also no evaluation outside of the levels of training. Numbers stand in for tensors, for speed."""
    sampler = SAMPLERS[name]
    low, high = SCHEDULE.sigma_min * (1 - 1e-9), SCHEDULE.sigma_max * (1 + 1e-9)

    def denoise(x: Any, sigma: float) -> Any:
        assert low <= sigma <= high
        return x / (1 + sigma**2)

    for steps in counts:
        sigmas = sampler.sigmas(SCHEDULE, steps)
        x: Any = sampler.start(cast("Any", 1.0), sigmas[0])
        run = list(sampler(denoise, x, sigmas, cast("Any", None), **options))
        assert len(run) == steps
        assert run[-1].sigma_next == 0
        assert math.isfinite(run[-1].x)


@pytest.mark.parametrize(
    ("name", "sampler", "spacing"),
    [
        ("DPM++ 2M Karras", "DPM++ 2M", "karras"),
        ("dpm++ 2m karras", "DPM++ 2M", "karras"),
        ("DPM++ 2M", "DPM++ 2M", "karras"),
        ("DPM++ 2M Automatic", "DPM++ 2M", "karras"),
        ("DPM++ 2M SGM Uniform", "DPM++ 2M", "sgm_uniform"),
        ("DPM++ 2M SDE Heun Exponential", "DPM++ 2M SDE Heun", "exponential"),
        ("DPM++ 2M SDE", "DPM++ 2M SDE", "exponential"),
        ("DPM++ 2S a Karras", "DPM++ 2S a", "karras"),
        ("Euler a", "Euler a", "uniform"),
        ("Euler Align Your Steps", "Euler", "align_your_steps"),
        ("LMS Karras", "LMS", "karras"),
        ("DPM2 a", "DPM2 a", "karras"),
        ("DDIM", "DDIM", "ddim_uniform"),
        ("DDIM Uniform", "DDIM", "uniform"),
        ("UniPC trailing", "UniPC", "turbo"),
        ("uni_pc_bh2", "UniPC BH2", "sgm_uniform"),
        # k-diffusion's names, and the web UI's older keys
        ("dpmpp_2m", "DPM++ 2M", "karras"),
        ("sample_dpmpp_3m_sde", "DPM++ 3M SDE", "exponential"),
        ("k_dpm_2_a", "DPM2 a", "karras"),
        ("k_dpmpp_2m_ka", "DPM++ 2M", "karras"),
        ("euler_ancestral", "Euler a", "uniform"),
        ("dpm_2_ancestral", "DPM2 a", "karras"),
        ("k_dpm_ad", "DPM adaptive", "uniform"),
    ],
)
def test_names_are_understood(name: str, sampler: str, spacing: str):
    assert parse(name) == (SAMPLERS[sampler], spacing)


def test_a_schedule_takes_the_place_of_the_one_in_the_name():
    assert parse("DPM++ 2M Karras", "SGM Uniform") == (SAMPLERS["DPM++ 2M"], "sgm_uniform")
    assert parse("Euler Karras", "Automatic") == (SAMPLERS["Euler"], "uniform")
    with pytest.raises(SamplerError, match="unknown spacing 'caras'"):
        parse("Euler", "caras")


def test_every_name_with_every_spacing_is_understood():
    for sampler in SAMPLERS.values():
        assert parse(sampler.name) == (sampler, sampler.spacing)
        for key, spacing in SPACINGS.items():
            assert parse(f"{sampler.name} {spacing.label}") == (sampler, key)
            assert parse(f"{sampler.name} {key}") == (sampler, key)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("DPM+ 2M Karas", "DPM++ 2M"), ("Eular a", "Euler a"), ("unicp", "UniPC"), ("??", "Euler")],
)
def test_an_unknown_name_gets_suggestions(name: str, hint: str):
    with pytest.raises(SamplerError) as error:
        parse(name)
    assert hint in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_that_a_sampler_does_not_have_is_refused():
    with pytest.raises(SamplerError, match="'Euler' has no option 'eta'; it has s_churn"):
        SAMPLERS["Euler"](
            gaussians([0.0]), torch.zeros(1, *SHAPE), [1.0, 0.0], GaussianNoise(SHAPE, [0]), eta=1.0
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LMS", {"order": 5}),
        ("UniPC", {"order": 4}),
        ("UniPC", {"variant": "bh3"}),
        ("DPM adaptive", {"order": 1}),
        ("DPM++ 2M SDE", {"solver_type": "euler"}),
    ],
)
def test_an_option_out_of_range_is_refused(name: str, options: dict[str, Any]):
    sampler = SAMPLERS[name]
    with pytest.raises(SamplerError, match="must be"):
        list(
            sampler(
                gaussians([0.0]), torch.zeros(1, *SHAPE), [1.0, 0.0], GaussianNoise(SHAPE, [0]), **options
            )
        )


def test_defaults_are_those_of_the_web_ui():
    for sampler in SAMPLERS.values():
        if "eta" in sampler.options:
            assert sampler.options["eta"] == (0.0 if sampler.name == "DDIM" else 1.0)
        for name, default in {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}.items():
            assert sampler.options.get(name, default) == default


def test_dpm_adaptive_stops_at_a_network_that_returns_nan():
    x = torch.ones(1, *SHAPE)
    with pytest.raises(NotFiniteError, match="no length"):
        list(
            SAMPLERS["DPM adaptive"](
                lambda x, sigma: x * math.nan, x, [10.0, 0.1, 0.0], GaussianNoise(SHAPE, [0])
            )
        )
