"""Few steps of a consistency model are those of diffusers' LCMScheduler."""

import math
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.denoise import Conditioning, Denoiser, Prediction
from ldm.samplers.lcm import lcm
from ldm.schedules import NoiseSchedule


def network(x: Tensor, t: Tensor, *_: object) -> Tensor:
    """Something that predicts a noise, of x (B, C, h, w) and t (B,)."""
    return torch.tanh(x.flip(1) / 2 + t.double().view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_same_steps_same_start_same_picture(steps: int):
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    theirs: Any = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    theirs.set_timesteps(steps)
    x = start = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(1)
    found: Any = None
    for t in theirs.timesteps:
        found = theirs.step(network(x, t[None]), t, x, generator=random)
        x = found.prev_sample

    schedule = NoiseSchedule.scaled_linear()
    sigmas = [schedule.sigma(float(t)) for t in theirs.timesteps] + [0.0]
    denoiser = Denoiser(network, schedule, Prediction.EPS, torch.float64)  # pyright: ignore[reportArgumentType]
    noise, drawn = torch.Generator().manual_seed(1), count()

    def drawing(*_: float) -> Tensor:
        next(drawn)
        return torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=noise)

    *_, last = lcm(
        lambda x, sigma: denoiser(x, sigma, Conditioning()),
        start * math.sqrt(1 + sigmas[0] ** 2),  # theirs is scaled to unit variance
        sigmas,
        drawing,
    )
    assert next(drawn) == steps - 1
    # Their schedule is float32, and so is what our denoiser returns.
    assert torch.allclose(last.x, found.denoised, rtol=1e-5, atol=1e-5 * found.denoised.abs().max().item())
