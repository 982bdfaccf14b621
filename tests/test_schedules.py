"""Schedules and spacings: the golden ones, and what must hold for every one of them."""

import math
from itertools import pairwise

import numpy as np
import pytest
from safetensors.torch import load_file

from ldm.errors import RequestError, SamplerError
from ldm.schedules import NoiseSchedule, sigmas
from ldm.spacings import SPACINGS, Kind, beta_quantiles, spacing_name
from tests.golden import golden

GOLDEN = {
    name: value.double().numpy()
    for name, value in load_file(golden("schedules/schedules.safetensors")).items()
}
SD = NoiseSchedule.scaled_linear()
# The web UI's and k-diffusion's schedule, from a table of abar in float32.
SD32 = NoiseSchedule.from_alphas_cumprod(GOLDEN["sd/alphas_cumprod_f32"])

TRAINED = {
    "sd": SD,
    "ldm": NoiseSchedule.scaled_linear(0.0015, 0.0195),
    "ldsr": NoiseSchedule.scaled_linear(0.0015, 0.0155),
    "cosine": NoiseSchedule.cosine(),
    "sqrt_linear": NoiseSchedule.linear(),
    "sqrt": NoiseSchedule.sqrt(),
}
COUNTS = (1, 2, 3, 5, 8, 10, 15, 20, 25, 28, 30, 50, 100)


@pytest.mark.parametrize("name", TRAINED)
def test_training_schedules_equal_compvis(name: str):
    np.testing.assert_allclose(TRAINED[name].alphas_cumprod, GOLDEN[f"{name}/alphas_cumprod_f64"], rtol=1e-12)


@pytest.mark.parametrize("name", ["sd", "ldm", "ldsr"])
def test_sigmas_of_training_equal_forge_and_k_diffusion(name: str):
    np.testing.assert_allclose(TRAINED[name].sigmas, GOLDEN[f"{name}/forge_sigmas_f32"], rtol=1e-6)
    from_float32 = NoiseSchedule.from_alphas_cumprod(GOLDEN[f"{name}/alphas_cumprod_f32"])
    # 3e-6: k-diffusion computes 1 - abar in float32, too.
    np.testing.assert_allclose(from_float32.sigmas, GOLDEN[f"{name}/kdiffusion_sigmas_f32"], rtol=3e-6)


def test_zero_terminal_snr_equals_forge():
    """5e-7 in abar: the original makes it by several operations in float32, which round by 6e-8 each.

    The lowest sigmas magnify that, as they come from 1 - abar.
    """
    schedule, expected = SD.zero_terminal_snr(), GOLDEN["sd/zero_snr_sigmas_forge_f32"]
    np.testing.assert_allclose(schedule.alphas_cumprod, 1 / (1 + expected**2), atol=5e-7, rtol=0)
    np.testing.assert_allclose(schedule.sigmas[5:], expected[5:], rtol=1e-5)
    assert schedule.sigma_max == pytest.approx(4518.7637, rel=1e-6)
    assert schedule.sigma_min == pytest.approx(SD.sigma_min)


def test_conversions_equal_k_diffusion():
    """3e-6 and 1e-3 training steps: the original interpolates in float32."""
    for t, sigma in zip(GOLDEN["conv/t"], GOLDEN["conv/t_to_sigma"], strict=True):
        assert SD32.sigma(t) == pytest.approx(sigma, rel=3e-6)
    for sigma, t in zip(GOLDEN["conv/sigma"], GOLDEN["conv/sigma_to_t"], strict=True):
        assert SD32.t(sigma) == pytest.approx(t, abs=1e-3)


def test_t_and_sigma_are_inverse_and_clamped():
    for t in np.linspace(0, 999, 777):
        assert SD.t(SD.sigma(t)) == pytest.approx(t, abs=1e-9)
    assert SD.sigma(-5) == pytest.approx(SD.sigma_min)
    assert SD.sigma(2000) == pytest.approx(SD.sigma_max)
    assert (SD.t(0.0), SD.t(1e-9), SD.t(1e9)) == (0.0, 0.0, 999.0)
    assert [SD.t(sigma) for sigma in SD.sigmas] == pytest.approx(range(1000), abs=1e-9)


@pytest.mark.parametrize("values", [(), (1.0, 1.0), (0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan,)])
def test_levels_that_are_no_schedule_are_refused(values: tuple[float, ...]):
    with pytest.raises(RequestError, match="ascending"):
        NoiseSchedule(values)


def assert_golden(levels: list[float], name: str, rtol: float = 1e-6):
    np.testing.assert_allclose(levels, GOLDEN[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("n", COUNTS)
def test_spacings_equal_k_diffusion(n: int):
    """3e-6 where levels come out of a float32 table; a power of 7 in float32 needs no more either."""
    assert_golden(sigmas(SD32, n), f"discrete/n{n}", 3e-6)
    # 1 + sigma^2, as the original takes 1 from it in float32.
    vp = 1 + np.square(sigmas(SD32, n, "vp"))
    np.testing.assert_allclose(vp, 1 + GOLDEN[f"vp/n{n}"] ** 2, rtol=3e-6)
    for name in ("karras", "exponential", "polyexponential"):
        assert_golden(sigmas(SD32, n, name), f"{name}/model/n{n}", 3e-6)
        assert_golden(sigmas(SD32, n, name, sigma_min=0.1, sigma_max=10.0), f"{name}/0.1_10/n{n}", 3e-6)
    assert_golden(sigmas(SD32, n, "karras", rho=5), f"karras_rho5/model/n{n}", 3e-6)
    assert_golden(sigmas(SD32, n, "polyexponential", rho=2), f"polyexponential_rho2/model/n{n}", 3e-6)
    if n > 1:
        levels = sigmas(SD32, n, "karras", discard_penultimate=True)
        assert_golden(levels, f"discard_penultimate/karras/n{n}", 3e-6)


@pytest.mark.parametrize("n", COUNTS)
def test_spacings_equal_the_webui(n: int):
    for name in ("uniform", "sgm_uniform", "simple", "normal", "beta", "turbo"):
        # 2e-5: sigma -> t -> sigma in float32, and for "turbo" the float64 table of Forge.
        assert_golden(sigmas(SD32, n, name), f"a1111/{name}/n{n}", 2e-5)
    # The web UI's ends at sigma_min, which leaves noise in the picture; ours ends at 0 like all others.
    np.testing.assert_allclose(
        sigmas(SD32, n, "kl_optimal")[:-1], GOLDEN[f"a1111/kl_optimal/n{n}"][:-1], rtol=3e-6
    )


@pytest.mark.parametrize(
    "n", [n for n in COUNTS if n > 1]
)  # with 1 step the web UI takes the table's last level
def test_tables_equal_the_webui(n: int):
    for ours, theirs in (
        ("align_your_steps", "align_your_steps"),
        ("align_your_steps_sdxl", "align_your_steps_sdxl"),
        ("gits", "align_your_steps_GITS"),
        ("gits_sdxl", "align_your_steps_GITS_sdxl"),
    ):
        assert_golden(sigmas(SD32, n, ours), f"a1111/{theirs}/n{n}")


@pytest.mark.parametrize("n", [n for n in COUNTS if 1000 % n == 0 and n > 1])
def test_ddim_steps_equal_the_originals_where_their_count_divides_1000(n: int):
    assert_golden(sigmas(SD32, n, "ddim"), f"a1111/ddim/n{n}", 3e-6)
    steps = [round(SD.t(level)) for level in sigmas(SD, n, "ddim")[-2::-1]]
    assert steps == GOLDEN[f"ddim_uniform/n{n}/timesteps"].tolist()
    assert steps == GOLDEN[f"a1111_timesteps/n{n}"].tolist()


@pytest.mark.parametrize("name", [name for name in SPACINGS if SPACINGS[name].kind is not Kind.TABLE])
def test_every_spacing_has_n_steps_down_to_zero(name: str):
    for n in (*range(1, 101), 333, 500, 501, 750, 998, 999, 1000):
        levels = sigmas(SD, n, name)
        assert len(levels) == n + 1
        assert all(a > b for a, b in pairwise(levels))
        assert levels[-1] == 0
        assert levels[0] <= SD.sigma_max * (1 + 1e-9)
        assert levels[-2] >= SD.sigma_min * (1 - 1e-9)
        if name != "ddim_uniform" or n == 1:
            assert levels[0] == pytest.approx(SD.sigma_max)


@pytest.mark.parametrize("name", [name for name in SPACINGS if SPACINGS[name].kind is Kind.TABLE])
def test_every_table_has_n_steps_down_to_zero(name: str):
    for n in (1, 2, 3, 4, 7, 100, 1000):
        levels = sigmas(SD, n, name)
        assert len(levels) == n + 1
        assert all(a > b for a, b in pairwise(levels))
        assert levels[-1] == 0
        assert levels[0] > 14


@pytest.mark.parametrize("schedule", [*TRAINED.values(), SD.zero_terminal_snr()], ids=[*TRAINED, "zero snr"])
def test_every_spacing_works_on_every_schedule(schedule: NoiseSchedule):
    for name in SPACINGS:
        for n in (1, 2, 3, 20):
            levels = sigmas(schedule, n, name)
            assert len(levels) == n + 1
            assert all(a > b for a, b in pairwise(levels))


def test_beta_quantiles_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    levels = np.array([0, 1e-6, 1e-3, 0.1, 0.499, 0.5, 0.7, 0.999, 1])
    for a in (0.6, 1.0, 2.5):
        expected = stats.beta.ppf(levels, a, a)
        np.testing.assert_allclose(beta_quantiles(levels, a), expected, rtol=1e-12, atol=1e-14)


def test_overrides_move_the_ends():
    for name, spacing in SPACINGS.items():
        if spacing.kind is Kind.TABLE:
            with pytest.raises(RequestError, match="fixed ends"):
                sigmas(SD, 10, name, sigma_max=5.0)
            continue
        levels = sigmas(SD, 200, name, sigma_min=0.2, sigma_max=5.0)
        assert 0.2 - 1e-9 <= levels[-2] < 0.25
        assert 4.7 < levels[0] <= 5.0 + 1e-9


def test_discarding_the_penultimate_level_keeps_the_number_of_steps():
    for n in (1, 2, 3, 10):
        levels, longer = sigmas(SD, n, "karras", discard_penultimate=True), sigmas(SD, n + 1, "karras")
        assert levels == [*longer[:-2], 0.0]


def test_a_list_of_levels_is_taken_as_it_is_or_interpolated():
    assert sigmas(SD, 3, [9.0, 3.0, 1.0]) == [9.0, 3.0, 1.0, 0.0]
    assert sigmas(SD, 3, [9.0, 3.0, 1.0, 0.0]) == [9.0, 3.0, 1.0, 0.0]
    assert sigmas(SD, 5, [9.0, 1.0]) == pytest.approx([9.0, 3 * 3**0.5, 3.0, 3**0.5, 1.0, 0.0])


@pytest.mark.parametrize(
    "levels", [[], [0.0], [1.0, 2.0], [1.0, 1.0], [1.0, -1.0], [math.nan, 0.0], [math.inf, 1.0]]
)
def test_a_list_that_does_not_fall_is_refused(levels: list[float]):
    with pytest.raises(RequestError, match="strictly decreasing"):
        sigmas(SD, 2, levels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 5, "sigma_min": 20.0}, "sigma_min < sigma_max"),
        ({"steps": 5, "sigma_min": 0.0}, "sigma_min < sigma_max"),
        ({"steps": 5, "sigma_max": math.nan}, "sigma_min < sigma_max"),
        ({"steps": 5, "spacing": "karras", "rho": 0.0}, "rho must be positive"),
        ({"steps": 5, "spacing": "simple", "rho": 7.0}, "has no rho"),
        ({"steps": 1001, "spacing": "simple"}, "ask for fewer steps"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(settings: dict, message: str):
    with pytest.raises(RequestError, match=message):
        sigmas(SD, **settings)


def test_spacing_names_are_read_in_any_spelling():
    assert (spacing_name("ddim"), spacing_name("Trailing")) == ("ddim_uniform", "turbo")
    for text in ("SGM Uniform", "sgm-uniform", "SGMUniform", "sgm_uniform"):
        assert spacing_name(text) == "sgm_uniform"
    for key, spacing in SPACINGS.items():
        assert spacing_name(spacing.label) == spacing_name(key) == key
    with pytest.raises(SamplerError, match="did you mean 'karras'"):
        spacing_name("karas")
