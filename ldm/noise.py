"""Random numbers: one independent stream per image, drawn on the CPU.

An image's noise depends on its own seed and nothing else, so the same seed gives the same picture on any
device and at any place in any batch. A sampler asks for noise by calling `noise(sigma, sigma_next)` and gets
unit variance in the shape of x. One call is one request; the order of requests is part of a sampler's
definition.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ldm.philox import Philox

Noise = Callable[[float, float], Tensor]
"""(sigma, sigma_next) -> unit-variance noise, (B, C, h, w)."""

Stream = Callable[[Sequence[int]], Tensor]
"""shape -> the next normal numbers of one image."""


def torch_stream(seed: int) -> Stream:
    """PyTorch's CPU generator (mt19937)."""
    return partial(torch.randn, generator=torch.Generator("cpu").manual_seed(seed))


def philox_stream(seed: int) -> Stream:
    """The generator of NVIDIA cards; see `ldm.philox` for how far it agrees with them."""
    return Philox(seed).randn


class GaussianNoise:
    """Independent normal numbers at each request. The first one is also how the latents of a picture start.

    shape: (C, h, w) of one latent. seeds: one per image.
    """

    def __init__(
        self,
        shape: Sequence[int],
        seeds: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        stream: Callable[[int], Stream] = torch_stream,
    ):
        self.shape = tuple(shape)
        self.streams = [stream(seed) for seed in seeds]
        self.device = device

    def draw(self) -> Tensor:
        """The next noise, (B, C, h, w) float32."""
        return torch.stack([stream(self.shape) for stream in self.streams]).to(self.device)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return self.draw()


class BrownianNoise:
    """Increments of a Brownian motion over sigma, for solvers of stochastic differential equations.

    The path is a function of the seed alone. A run with more steps sees the same path at a finer grain, so a
    picture changes little with the number of steps, and a solver may look at overlapping intervals.

    shape: (C, h, w) of one latent. seeds: one per image.
    sigma_min, sigma_max: the range of the path, from the lowest positive to the highest level of the whole
        schedule, also where a run uses only a part of it. Requests are clamped to it.

    Reproduces k-diffusion's BrownianTreeNoiseSampler, which is built on torchsde 0.2.6.
    """

    def __init__(
        self,
        shape: Sequence[int],
        seeds: Sequence[int],
        sigma_min: float,
        sigma_max: float,
        *,
        device: torch.device | str = "cpu",
    ):
        self.paths = [BrownianPath(tuple(shape), seed, sigma_min, sigma_max) for seed in seeds]
        self.device = device

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        low, high = sorted((sigma, sigma_next))
        # The path runs upwards in sigma, a run downwards: its increments have the other sign.
        scale = math.copysign(1 / math.sqrt(high - low), sigma_next - sigma)
        return torch.stack([path.increment(low, high) * scale for path in self.paths]).to(self.device)


class BrownianPath:
    """A Brownian motion W over [start, end] that can be asked for any of its increments, in any order.

    The path is a binary tree of intervals. Knowing the increment over an interval, that over its left half is
    normal with a known mean and variance, the Brownian bridge of Lévy 1948. The random numbers of each bridge
    come from a seed made of the path's seed and the place in the tree, so nothing has to be remembered.

    Kidger et al. 2021, "Efficient and accurate gradients for neural SDEs", arXiv:2105.13493, section 4.
    """

    # Levels are rounded to six decimals, which ends the bisection after some 24 halvings.
    DIGITS = 6

    def __init__(self, shape: tuple[int, ...], seed: int, start: float, end: float):
        self.shape = shape
        self.seed = seed
        self.start, self.end = round(start, self.DIGITS), round(end, self.DIGITS)
        self.total = self._normal(()) * math.sqrt(end - start)

    def increment(self, low: float, high: float) -> Tensor:
        """W(high) - W(low), of the path's shape."""
        low, high = (min(max(round(level, self.DIGITS), self.start), self.end) for level in (low, high))
        if low == high:
            return torch.zeros(self.shape)
        parts = self._parts(low, high, self.start, self.end, self.total, place=0, depth=0)
        return sum(parts, torch.zeros(self.shape))

    def _parts(
        self, low: float, high: float, start: float, end: float, increment: Tensor, place: int, depth: int
    ) -> Iterator[Tensor]:
        """The increments over the intervals of the tree that make up [low, high] inside [start, end]."""
        if (low, high) == (start, end):
            yield increment
            return
        middle = round((start + end) / 2, self.DIGITS)
        share = (middle - start) / (end - start)
        spread = math.sqrt((middle - start) * (end - middle) / (end - start))
        left = share * increment + spread * self._normal((place, depth))
        if low < middle:
            yield from self._parts(low, min(high, middle), start, middle, left, 2 * place, depth + 1)
        if high > middle:
            right = increment - left
            yield from self._parts(max(low, middle), high, middle, end, right, 2 * place + 1, depth + 1)

    def _normal(self, key: tuple[int, ...]) -> Tensor:
        """The normal numbers that belong to a place of the tree, () being the whole path.

        The entropy pool of 24 words is torchsde's choice; another size would be another path.
        """
        seed = np.random.SeedSequence(self.seed, spawn_key=key, pool_size=24).generate_state(1)[0]
        return torch.randn(self.shape, generator=torch.Generator("cpu").manual_seed(int(seed)))
