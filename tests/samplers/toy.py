"""The toy problem of the golden data (tests/golden/README.md, samplers/), and how to run samplers on it."""

import json
from collections.abc import Iterator
from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.denoise import Denoise
from ldm.samplers import Step
from tests.golden import golden

TOY = {name: value.double() for name, value in load_file(golden("samplers/toy.safetensors")).items()}


def mixture(x: Tensor, sigma: float) -> Tensor:
    """The ideal denoiser of a mixture of Gaussians, element by element."""
    mu, s, w = (TOY[f"mixture_{name}"].to(x) for name in ("mu", "s", "w"))
    s, w = s.view(-1, 1, 1, 1, 1), w.view(-1, 1, 1, 1, 1)
    v = s**2 + sigma**2
    r = (w.log() - v.log() / 2 - (x - mu[:, None]) ** 2 / v / 2).softmax(dim=0)
    return (r * (mu[:, None] * sigma**2 + x * s**2) / v).sum(dim=0)


def nonlinear(x: Tensor, sigma: float) -> Tensor:
    """A denoiser of no distribution, with neighbours that see each other along the last axis."""
    a, b, c = TOY["nonlinear_abc"].tolist()
    level = torch.tensor(sigma, dtype=x.dtype)
    return (
        a * torch.tanh(b * x / (1 + level**2).sqrt())
        + c * torch.sin(x / (1 + level)) * torch.cos(torch.log1p(level))
        + 0.1 * x.mean(dim=-1, keepdim=True) / (1 + level)
    )


DENOISERS: dict[str, Denoise] = {"mixture": mixture, "nonlinear": nonlinear}


class Requests:
    """Serves the stored noise in order and counts the requests."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.stored = TOY["noise"].to(dtype)
        self.count = 0

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        self.count += 1
        return self.stored[self.count - 1]


class Counted:
    """A denoiser that remembers the levels it was called at."""

    def __init__(self, denoise: Denoise):
        self.denoise = denoise
        self.levels: list[float] = []

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.levels.append(sigma)
        return self.denoise(x, sigma)


@cache
def cases(name: str) -> tuple[dict, dict[str, Tensor]]:
    """The cases of a golden file, and its tensors."""
    tensors = load_file(golden(f"samplers/{name}.safetensors"))
    return json.loads(golden(f"samplers/{name}.json").read_text())["cases"], tensors


def last(steps: Iterator[Step]) -> Tensor:
    """The result of a run."""
    *_, step = steps
    return step.x


def relative(x: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return float((x.double() - expected.double()).abs().max() / expected.double().abs().max())
