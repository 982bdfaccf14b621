"""Every sampler of k-diffusion and Forge is reproduced on the golden runs, in float64."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ldm.samplers import dpm_solver, dpmpp, multistep
from ldm.samplers.ddim import ddpm
from ldm.samplers.dpm2 import dpm_2, dpm_2_ancestral
from ldm.samplers.euler import euler, euler_ancestral
from ldm.samplers.heun import heun, heunpp2
from ldm.samplers.lcm import lcm
from ldm.samplers.restart import restart
from tests.samplers.toy import DENOISERS, TOY, Counted, Requests, cases, last, relative


@dataclass(frozen=True)
class Original:
    """Our function, and how far a run may be from the original's: 1e-6 but where a reason is given."""

    function: Callable
    tolerance: float = 1e-6
    asks_always: bool = False  # the original draws noise that it then multiplies by 0, and we do not


FIXED_LEVELS = {
    "euler": Original(euler, asks_always=True),
    "heun": Original(heun, asks_always=True),
    "heunpp2": Original(heunpp2, asks_always=True),
    "dpm_2": Original(dpm_2, asks_always=True),
    "euler_ancestral": Original(euler_ancestral, asks_always=True),
    "dpm_2_ancestral": Original(dpm_2_ancestral, asks_always=True),
    "dpmpp_2s_ancestral": Original(dpmpp.dpmpp_2s_ancestral, asks_always=True),
    "dpmpp_sde": Original(dpmpp.dpmpp_sde),
    "dpmpp_2m": Original(dpmpp.dpmpp_2m),
    "dpmpp_2m_sde": Original(dpmpp.dpmpp_2m_sde),
    "dpmpp_3m_sde": Original(dpmpp.dpmpp_3m_sde),
    "lms": Original(multistep.lms),
    "ipndm": Original(multistep.ipndm),
    "ipndm_v": Original(multistep.ipndm_v),
    # The original integrates by a sum of 10,000 terms with one term too many, we integrate exactly.
    "deis": Original(multistep.deis, tolerance=1e-4),
    # The original computes Karras's levels for its repetitions in float32.
    "restart": Original(restart, tolerance=1e-5),
    "lcm": Original(lcm),
    "ddpm": Original(ddpm),
}

CASES = [(file, case) for file in ("kdiffusion", "forge_extra") for case in cases(file)[0]]


def run(original: Original, file: str, case: str) -> tuple[float, int, int]:
    """A golden case with our function -> the difference, and the counts of requests and of evaluations."""
    record, tensors = cases(file)[0][case], cases(file)[1]
    sigmas = tensors[f"{case}/sigmas"].double().tolist()
    x = TOY["x_init_unit"] * sigmas[0]
    if case.endswith("_from_half"):
        x = x + TOY["x0_img2img"]
    options = {"order" if name == "max_order" else name: value for name, value in record["args"].items()}
    noise, denoise = Requests(), Counted(DENOISERS[record["denoiser"]])
    result = last(original.function(denoise, x, sigmas, noise, **options))
    return relative(result, tensors[f"{case}/final_f64"]), noise.count, len(denoise.levels)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_run_equals_the_original(file: str, case: str):
    record = cases(file)[0][case]
    original = FIXED_LEVELS[record["sampler"]]
    difference, requests, evaluations = run(original, file, case)
    assert difference < original.tolerance
    assert evaluations == record["model_calls"]
    # An option that is 0 makes the noise vanish; then it need not be drawn.
    if not original.asks_always or record["args"].get("s_churn") or record["args"].get("eta"):
        assert requests == record["noise_calls"]


@pytest.mark.parametrize("case", [case for file, case in CASES if case.startswith("deis")])
def test_deis_differs_from_the_original_by_its_quadrature_alone(case: str, monkeypatch: pytest.MonkeyPatch):
    def riemann_sum(levels, end, clock, terms=10_000):
        nodes, stop = clock(np.array(levels)), clock(np.array(end))
        t = np.linspace(nodes[0], stop, terms)
        d, b = _vp_betas()
        log_variance = d * t**2 / 2 + b * t
        speed = (d * t + b) * np.exp(log_variance) / (2 * np.sqrt(np.expm1(log_variance)))  # dsigma / dt
        weights = []
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)
            polynomial = np.prod((t[:, None] - others) / (node - others), axis=1)
            weights.append(float((speed * polynomial).sum() * (stop - nodes[0]) / terms))
        return weights if len(levels) > 1 else [end - levels[0]]

    monkeypatch.setattr(multistep, "_integrate", riemann_sum)
    # 2e-6: the original computes the constants of its time in float32.
    assert run(FIXED_LEVELS["deis"], "forge_extra", case)[0] < 2e-6


@functools.cache
def _vp_betas() -> tuple[float, float]:
    first, final = np.log1p(0.002**2), np.log1p(80.0**2)
    d = 2 * (final - first / 1e-3) / (1 - 1e-3)
    return d, final - d / 2


@pytest.mark.parametrize("case", list(cases("kdiffusion_dpm_fast_adaptive")[0]))
def test_dpm_solver_equals_the_original(case: str):
    """1e-4: the original computes the levels in float32 whatever x is, and a noisy run doubles that up."""
    records, tensors = cases("kdiffusion_dpm_fast_adaptive")
    record = records[case]
    # The adaptive original has one error for the whole batch: here a batch of 1 with twice the channels.
    shape = (1, 8, 8, 8) if record["sampler"] == "dpm_adaptive" else (2, 4, 8, 8)
    toy, requests = DENOISERS[record["denoiser"]], Requests()
    denoise = Counted(lambda x, sigma: toy(x.view(2, 4, 8, 8), sigma).view(shape))
    high, low = record["sigma_max"], record["sigma_min"]
    sigmas = [high] * (record.get("n", 2) - 1) + [low, 0.0]
    sampler = getattr(dpm_solver, record["sampler"])
    x = (TOY["x_init_unit"] * torch.tensor(high, dtype=torch.float32)).view(shape)
    result = last(sampler(denoise, x, sigmas, lambda a, b: requests(a, b).view(shape), **record["args"]))
    assert relative(result.view(2, 4, 8, 8), tensors[f"{case}/final_f64"]) < 1e-4
    assert len(denoise.levels) == record["model_calls"]
