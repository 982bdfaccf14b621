"""Random numbers: one independent stream per image, drawn on the CPU.

An image's noise depends on its own seed and nothing else, so the same seed gives the same picture on any
device and at any place in any batch. A sampler asks for noise by calling `noise(sigma, sigma_next)` and gets
unit variance in the shape of x. One call is one request; the order of requests is part of a sampler's
definition.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ldm.compat import NoiseSource
from ldm.philox import Philox
from ldm.request import MAX_SEED, Request

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


STREAMS: Mapping[NoiseSource, Callable[[int], Stream]] = {"cpu": torch_stream, "philox": philox_stream}


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


def starting_noise(
    request: Request, shape: Sequence[int], *, factor: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, GaussianNoise]:
    """What the pictures of a request start from, (B, C, h, w), and the source of their later noise.

    shape: (C, h, w) of one latent. factor: pixels for each of its pixels, along one side.

    Each picture draws its start from its seed. Three settings change that, all as in the web UI:
    - seed_resize_from: the start comes from the same seed in another size, centred on the noise of this one,
      so that a picture keeps its composition when its size changes.
    - variation_strength: the start is turned towards the noise of the variation seed, see `slerp`.
    - ensd: only the start comes from the seed, and the later noise from seed + ensd.
    """
    shape, stream = tuple(shape), STREAMS[request.compat.noise]
    width, height = request.seed_resize_from or (shape[2] * factor, shape[1] * factor)
    drawn = (shape[0], height // factor, width // factor)
    singles = [request.single(i) for i in range(request.batch_size)]
    noise = GaussianNoise(shape, [one.seed for one in singles], device=device, stream=stream)

    def start(one: Request, own: Tensor) -> Tensor:
        x = own if drawn == shape else stream(one.seed)(drawn)
        if one.variation_strength:
            x = slerp(x, stream(one.variation_seed)(drawn), one.variation_strength)
        return x if drawn == shape else centred(x, own)

    # On the CPU, and only then moved: the same bits for every device.
    starts = [start(one, own(shape)) for one, own in zip(singles, noise.streams, strict=True)]
    if request.ensd:
        seeds = [(one.seed + request.ensd) % (MAX_SEED + 1) for one in singles]
        noise = GaussianNoise(shape, seeds, device=device, stream=stream)
    return torch.stack(starts).to(device), noise


def slerp(a: Tensor, b: Tensor, strength: float) -> Tensor:
    """Turn noise a (C, h, w) towards b: 0 gives a, 1 gives b, and all between have the variance of noise.

    A mean of two noises would have less. The turn is one of whole vectors on a sphere (Shoemake 1985,
    "Animating rotation with quaternion curves"). The web UI turns each column of the latent by itself, its
    vectors being the h numbers along a column; so do we, as its pictures depend on it. Where two columns are
    parallel there is no direction to turn in, and the plain mean is right.
    """
    cosine = (a / a.norm(dim=1, keepdim=True) * (b / b.norm(dim=1, keepdim=True))).sum(1)
    mean = a * (1 - strength) + b * strength
    if cosine.mean() > 0.9995:
        return mean
    angle = torch.acos(cosine)  # (C, w); NaN where rounding made a cosine greater than 1
    sine = torch.sin(angle)
    share_a, share_b = torch.sin((1 - strength) * angle) / sine, torch.sin(strength * angle) / sine
    turned = share_a.unsqueeze(1) * a + share_b.unsqueeze(1) * b
    return torch.where((sine > 0).unsqueeze(1), turned, mean)


def centred(inner: Tensor, outer: Tensor) -> Tensor:
    """`inner` laid onto the middle of `outer`, both (C, h, w); what of it is larger is cut off."""
    result = outer.clone()
    source, target = [slice(None)], [slice(None)]
    for small, large in zip(inner.shape[1:], outer.shape[1:], strict=True):
        margin = (large - small) // 2  # negative where the inner one is larger
        size = min(small, small + 2 * margin)
        source.append(slice(max(-margin, 0), max(-margin, 0) + size))
        target.append(slice(max(margin, 0), max(margin, 0) + size))
    result[tuple(target)] = inner[tuple(source)]
    return result


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
        stream: Callable[[int], Stream] = torch_stream,
    ):
        self.paths = [BrownianPath(tuple(shape), seed, sigma_min, sigma_max, stream) for seed in seeds]
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

    def __init__(
        self,
        shape: tuple[int, ...],
        seed: int,
        start: float,
        end: float,
        stream: Callable[[int], Stream] = torch_stream,
    ):
        self.shape = shape
        self.seed = seed
        self.stream = stream
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
        return self.stream(int(seed))(self.shape)
