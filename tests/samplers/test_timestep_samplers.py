"""DDIM, PLMS and UniPC equal those of the web UI, CompVis and diffusers.

The originals run over training steps in the variance-preserving scale. The tests translate: a level for each
training step, x scaled by sqrt(1 + sigma^2), and the golden eps models turned into a denoiser. Our samplers
know nothing of it.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.denoise import Denoise
from ldm.samplers import dpmpp, multistep, unipc
from ldm.samplers.ddim import ddim
from ldm.schedules import NoiseSchedule, sigmas
from tests.golden import golden
from tests.samplers.toy import DENOISERS, TOY, Requests, cases, last, relative

SCHEDULES = load_file(golden("schedules/schedules.safetensors"))
# The originals look levels up in float32 tables.
ABAR = SCHEDULES["sd/alphas_cumprod_f32"].double().numpy()
TABLE = np.sqrt((1 - ABAR) / ABAR)


def run(
    sampler: Callable,
    denoise: Denoise,
    levels: Sequence[float],
    *,
    images: int = 2,
    x: Tensor | None = None,
    **options,
) -> Tensor:
    """From unit noise to the result, both in the variance-preserving scale."""
    requests = Requests()
    x = TOY["x_init_unit"][:images] if x is None else x
    x = x * math.sqrt(1 + levels[0] ** 2)
    result = last(sampler(denoise, x, levels, lambda a, b: requests(a, b)[:images], **options))
    return result / math.sqrt(1 + levels[-1] ** 2)


def looked_up(toy: Denoise, levels: Sequence[float], seen: Sequence[float]) -> Denoise:
    """The toy seen through an eps model that takes each of `levels` for another one, found in its table."""
    seen_at = dict(zip(levels, seen, strict=True))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        model_sigma = seen_at[sigma]
        x_model = x * math.sqrt((1 + model_sigma**2) / (1 + sigma**2))
        eps = (x_model - toy(x_model, model_sigma)) / model_sigma
        return x - sigma * eps

    return denoise


WEBUI, WEBUI_TENSORS = cases("a1111_timesteps")


@pytest.mark.parametrize("case", [case for case in WEBUI if not case.startswith("unipc")])
def test_ddim_and_plms_equal_the_webui(case: str):
    record = WEBUI[case]
    levels = TABLE[WEBUI_TENSORS[f"{case}/timesteps"].flip(0)].tolist()
    sampler = {"ddim": ddim, "plms": multistep.plms}[record["sampler"]]
    result = run(sampler, DENOISERS[record["denoiser"]], levels, **record["args"])
    assert relative(result, WEBUI_TENSORS[f"{case}/final_f64"]) < 1e-6


def unipc_run(case: str) -> float:
    """A UniPC case of the web UI -> the relative difference."""
    record, options = WEBUI[case], WEBUI[case]["options"]
    timesteps = WEBUI_TENSORS[f"{case}/timesteps"].tolist()
    steps = len(timesteps)
    # Its time runs from 0.001 to 1, and log sqrt(abar) is linear in it between training steps.
    first, final = ((timesteps[-1] + 1) / 1000 if record["args"].get("is_img2img") else 1.0), 0.001
    grid, log_alphas = np.arange(1, 1001) / 1000, np.log(ABAR) / 2

    def level(time: float | np.ndarray) -> np.ndarray:
        return np.sqrt(np.expm1(-2 * np.interp(time, grid, log_alphas)))

    if options["uni_pc_skip_type"] == "logSNR":
        spaced = np.geomspace(level(first), level(final), steps + 1)
        times = np.interp(-np.log1p(spaced**2) / 2, log_alphas[::-1], grid[::-1])
    elif options["uni_pc_skip_type"] == "time_quadratic":
        times = np.linspace(first**0.5, final**0.5, steps + 1) ** 2
    else:
        times = np.linspace(first, final, steps + 1)
    levels = level(times).tolist()
    seen = np.exp(np.interp(times * 1000 - 1, range(1000), np.log(TABLE))).tolist()
    result = run(
        unipc.unipc,
        looked_up(DENOISERS[record["denoiser"]], levels, seen),
        levels,
        images=record["batch"],
        order=options["uni_pc_order"],
        variant=options["uni_pc_variant"],
        lower_order_final=options["uni_pc_lower_order_final"],
    )
    return relative(result, WEBUI_TENSORS[f"{case}/final_f64"])


UNIPC = [case for case in WEBUI if case.startswith("unipc")]
SLIPPED = [case for case in UNIPC if "/vary_coeff/order2" in case or "/vary_coeff/order3" in case]


@pytest.mark.parametrize("case", sorted(set(UNIPC) - set(SLIPPED)))
def test_unipc_equals_the_webui(case: str):
    assert unipc_run(case) < 1e-6


@pytest.mark.parametrize("case", SLIPPED)
def test_unipc_vary_coeff_differs_from_the_webui_by_the_row_that_it_drops(
    case: str, monkeypatch: pytest.MonkeyPatch
):
    correct = unipc._weights

    def published(places: Sequence[float], h: float, variant: str) -> list[float]:
        """The corrector, told by its last place, as the original sums it up."""
        rows = len(places)
        if rows < 2 or places[-1] != 1.0:
            return correct(places, h, variant)
        phi, factorial = [-math.expm1(-h)], 1.0  # phi[k] is the original's h_phi of k + 1, negated
        for k in range(1, rows + 1):
            phi.append(1 / factorial - phi[-1] / h)
            factorial *= k + 1
        scaled = [[r**k / math.factorial(k + 1) for k in range(rows)] for r in places]
        inverse = np.linalg.inv(np.array(scaled))
        weights = [sum(phi[k + 1] * inverse[k, j] for k in range(rows - 1)) for j in range(rows - 1)]
        return [*weights, phi[rows] * inverse[rows - 2, -1]]

    assert unipc_run(case) > 1e-3
    monkeypatch.setattr(unipc, "_weights", published)
    assert unipc_run(case) < 1e-6


COMPVIS, COMPVIS_TENSORS = cases("compvis_ddim_plms")


@pytest.mark.parametrize("case", [case for case in COMPVIS if "mask" not in case])
def test_ddim_and_plms_equal_compvis(case: str):
    """1e-4: the original ran in float32, and guidance of scale 7.5 multiplies its rounding."""
    record = COMPVIS[case]
    # The original's last step goes to abar[0] and leaves that trace of noise.
    levels = TABLE[[*(record["model_call_timesteps"]), 0]].tolist()
    if record["sampler"].startswith("plms"):
        del levels[1]  # the second evaluation of the first step
    toy = DENOISERS[record["denoiser"]]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if "cfg_scale" not in record:
            return toy(x, sigma)
        cond, uncond = (
            toy(x, sigma) + 0.3 * torch.tensor(record[name], dtype=x.dtype).view(-1, 1, 1, 1)
            for name in ("cond", "uncond")
        )
        return uncond + record["cfg_scale"] * (cond - uncond)

    sampler = multistep.plms if record["sampler"].startswith("plms") else ddim
    options = {"eta": record["eta"]} if "eta" in record else {}
    if "temperature" in record:
        options["s_noise"] = record["temperature"]
    x = COMPVIS_TENSORS[f"{case}/encoded"].double() if "strength" in record else None
    assert relative(run(sampler, denoise, levels, x=x, **options), COMPVIS_TENSORS[f"{case}/final"]) < 1e-4


def test_ddim_equals_compvis_when_a_mask_is_wrapped_around_the_denoiser():
    """What changes a run wraps `denoise`: here x is replaced where the mask says, before each evaluation."""
    case = "ddim_mask/S10"
    levels = TABLE[[*COMPVIS[case]["model_call_timesteps"], 0]].tolist()
    mask, known, noise = TOY["mask"], TOY["x0_img2img"], iter(TOY["noise"][::2])

    def paste(x: Tensor, sigma: float) -> Tensor:
        return mask * (known + sigma * next(noise)) + (1 - mask) * x

    x = TOY["x_init_unit"] * math.sqrt(1 + levels[0] ** 2)
    for sigma, sigma_next in pairwise(levels):
        x = last(ddim(DENOISERS["mixture"], paste(x, sigma), [sigma, sigma_next], Requests()))
    x = x / math.sqrt(1 + levels[-1] ** 2)
    assert relative(x, COMPVIS_TENSORS[f"{case}/final"]) < 1e-5


DIFFUSERS, DIFFUSERS_TENSORS = cases("diffusers_reference")
# With fewer than 15 steps, diffusers ends a run to sigma_min by a first-order step; web UI and we do not.
OURS = [case for case in DIFFUSERS if not ("sigma_min_final" in case and DIFFUSERS[case]["n"] < 15)]


@pytest.mark.parametrize("case", [case for case in OURS if not case.startswith("ddim")])
def test_unipc_and_dpm_solver_equal_diffusers(case: str):
    """1e-4: the original ran in float32."""
    config = DIFFUSERS[case]["config"]
    levels = DIFFUSERS_TENSORS[f"{case}/sigmas"].double().tolist()
    seen = [*TABLE[DIFFUSERS_TENSORS[f"{case}/timesteps"]].tolist(), math.nan]
    if case.startswith("unipc"):
        sampler = unipc.unipc
        options = {"variant": config.get("solver_type", "bh2"), "order": config.get("solver_order", 2)}
    elif case.startswith("dpmsolver_multistep/sde"):
        sampler, options = dpmpp.dpmpp_2m_sde, {}
    elif "heun" in case:
        sampler, options = dpmpp.dpmpp_2m_sde, {"eta": 0.0, "solver_type": "heun"}
    else:
        sampler, options = dpmpp.dpmpp_2m, {}
    result = run(sampler, looked_up(DENOISERS["mixture"], levels, seen), levels, **options)
    assert relative(result, DIFFUSERS_TENSORS[f"{case}/final"]) < 1e-4


@pytest.mark.parametrize("steps", [5, 10])
def test_ddim_on_a_zero_snr_schedule_equals_diffusers(steps: int):
    """From pure noise, where sigma should be infinite and is 4518.8: hence 1e-3."""
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    result = run(ddim, DENOISERS["mixture"], sigmas(schedule, steps, "trailing"))
    assert relative(result, DIFFUSERS_TENSORS[f"ddim/trailing_zero_snr_v/n{steps}/final"]) < 1e-3
