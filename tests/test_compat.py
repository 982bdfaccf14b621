"""Choices that differ between tools: each profile's numbers are those of the original's own code."""

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

import ldm
from ldm.compat import PROFILES, Compatibility, profile
from ldm.errors import RequestError
from ldm.planning import plan
from ldm.samplers import SAMPLERS
from ldm.schedules import NoiseSchedule, ddim_levels, part_of_run
from tests.golden import golden
from tests.tiny_families import tiny

SCHEDULE = NoiseSchedule.scaled_linear()
PARTS = json.loads(golden("schedules/schedules.json").read_text())["img2img_steps"]


def test_ddim_visits_the_training_steps_of_compvis():
    cases = json.loads(golden("samplers/compvis_ddim_plms.json").read_text())["cases"].values()
    plain = [c for c in cases if c["sampler"] == "ddim" and "strength" not in c]
    assert len({c["S"] for c in plain}) > 1
    for case in plain:
        expected = [SCHEDULE.sigmas[t] for t in [*case["model_call_timesteps"], 0]]
        assert ddim_levels(SCHEDULE, case["S"], "compvis") == pytest.approx(expected, rel=1e-12)


def test_ddim_visits_the_training_steps_of_the_webui():
    tensors = load_file(golden("samplers/a1111_timesteps.safetensors"))
    cases = json.loads(golden("samplers/a1111_timesteps.json").read_text())["cases"].items()
    plain = [
        (name, c["n"]) for name, c in cases if c["sampler"] == "ddim" and not c["args"].get("is_img2img")
    ]
    assert len({n for _, n in plain}) > 1
    for name, n in plain:
        expected = [SCHEDULE.sigmas[t] for t in tensors[f"{name}/timesteps"].flip(0).tolist()]
        assert ddim_levels(SCHEDULE, n, "webui") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", ["compvis", "webui"])
def test_no_number_of_steps_leaves_the_table(rule):
    for steps in range(2, 1001):
        levels = ddim_levels(SCHEDULE, steps, rule)
        assert all(a > b > 0 for a, b in pairwise(levels))
        assert levels[0] <= SCHEDULE.sigma_max


@pytest.mark.parametrize("case", [c for c in PARTS if c.get("t_enc") is not None and c["total_steps"]])
def test_image_to_image_runs_as_many_steps_as_the_webui(case: dict):
    exact = case.get("img2img_fix_steps", True)  # the second pass of hires fix always is
    steps = case["steps"] if "steps" in case else case["hires_pass_explicit_steps"]
    rule = "exact" if exact else "webui"
    assert part_of_run(steps, case["denoising_strength"], rule) == (case["total_steps"], case["t_enc"] + 1)


def test_diffusers_runs_one_step_less_than_the_webui():
    assert part_of_run(20, 0.75, "diffusers") == (20, 15)
    assert part_of_run(20, 0.75, "webui") == (20, 16)
    assert part_of_run(20, 0.01, "diffusers") == (20, 1)


def test_a_trace_of_noise_is_left_at_unit_variance():
    models = tiny("sd1")
    request = ldm.Request(sampler="DDIM", steps=5, width=64, height=64, compat=profile("compvis"))
    run = plan(models, request)
    steps = list(ldm.sample(models, request))
    assert run.sigmas[-1] == pytest.approx(SCHEDULE.sigma_min)
    # The last update ends at sqrt(1 + sigma^2) times what the variance-preserving original holds.
    last = steps[-1]
    slope = (steps[-2].x - last.denoised) / last.sigma
    expected = (last.denoised + slope * last.sigma_next) / math.sqrt(1 + last.sigma_next**2)
    torch.testing.assert_close(last.x, expected, atol=1e-5, rtol=1e-5)


def test_old_karras_schedules_run_from_10_to_a_tenth():
    request = ldm.Request(sampler="DPM++ 2M Karras", steps=8, compat=Compatibility(old_karras_range=True))
    sigmas = plan(tiny("sd1"), request).sigmas
    assert (sigmas[0], sigmas[-2]) == (pytest.approx(10.0), pytest.approx(0.1))


def test_profiles_tell_only_what_differs():
    assert PROFILES["ldm"].differences() == {}
    assert profile("diffusers").differences() == {
        "emphasis": "none",
        "ddim_levels": "compvis",
        "strength": "diffusers",
    }
    assert {s.name for s in SAMPLERS.values() if s.spacing == "ddim_uniform"} == {"DDIM", "PLMS"}


def test_unknown_choices_are_refused():
    with pytest.raises(RequestError, match="noise must be one of 'cpu', 'philox', got 'gpu'"):
        Compatibility(noise="gpu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="choose from ldm, a1111"):
        profile("midjourney")
