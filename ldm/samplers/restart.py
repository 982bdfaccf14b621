"""Restart: a run that goes back up to a higher noise level to undo the errors it has gathered."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.denoise import Denoise
from ldm.noise import Noise
from ldm.samplers.heun import heun
from ldm.samplers.step import Step
from ldm.spacings import karras

# Between which levels a run is repeated. From the authors' settings for Stable Diffusion, as in the web UI.
RESTART_MIN, RESTART_MAX = 0.1, 2.0


@torch.no_grad()
def restart(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, s_noise: float = 1.0
) -> Iterator[Step]:
    """Heun's method down, noise back up from level 0.1 to 2, and down again.

    Xu et al. 2023, arXiv:2306.14878, algorithm 1. The steps asked for are shared between the run and its
    repetitions: none below 20 steps, nine steps once from 20, a quarter of the steps twice from 36. The
    levels are then Karras's between the ends of `sigmas` (web UI).
    """
    index = 0
    for levels, level_before in restart_segments(sigmas):
        if level_before:
            lift = math.sqrt(levels[0] ** 2 - level_before**2)
            x = x + noise(level_before, levels[0]) * (s_noise * lift)
        for step in heun(denoise, x, levels, noise):
            x = step.x
            yield step._replace(index=index)
            index += 1


def restart_segments(sigmas: Sequence[float]) -> list[tuple[list[float], float]]:
    """The runs down that make up a restart run: (their levels, the level that they are lifted from or 0)."""
    steps = len(sigmas) - 1
    if steps < 20:
        return [(list(sigmas), 0.0)]
    length, times = (9, 1) if steps < 36 else (steps // 4, 2)
    levels = [*karras(steps - length * times, sigmas[-2], sigmas[0]), 0.0]
    low = min(range(len(levels)), key=lambda i: abs(levels[i] - RESTART_MIN))
    high = min(range(len(levels)), key=lambda i: abs(levels[i] - RESTART_MAX))
    if high >= low:  # the run has no levels between the two
        return [(list(sigmas), 0.0)]
    again = karras(length + 1, levels[low], levels[high])
    first, last = levels[: low + 1], levels[low:]
    return [(first, 0.0), *[(again, levels[low])] * times, (last, 0.0)]
