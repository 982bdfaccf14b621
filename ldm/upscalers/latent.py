"""What the upscalers by latent diffusion share: the small picture beside the noisy latent, and tiles.

The latent of the large picture has the size of the small one, as such autoencoders make pictures 1/4 as wide
and high. So the small picture is given to the network as further input channels and is not encoded at all
(Rombach et al. 2022, arXiv:2112.10752, section 4.4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import CheckpointError, RequestError, check_range
from ldm.families import Family
from ldm.finite import UNET, finite, second_try
from ldm.images import to_pil, to_tensor
from ldm.latents import decode
from ldm.models import Models
from ldm.noise import GaussianNoise
from ldm.request import MAX_SEED
from ldm.samplers import SAMPLERS
from ldm.tiles import grid, tiled, tiled_strips
from ldm.upscalers.upscaler import Progress

MULTIPLE, SMALLEST = 64, 128  # pixels: sides of the small picture, the original's choice

DenoiseBeside = Callable[[Tensor, Tensor, float], Tensor]
"""(x (1, C, h, w), the small picture (1, 3, h, w), sigma) -> the denoised latent, as x."""


@dataclass(frozen=True)
class LatentUpscaler(ABC):
    """An upscaler, see `ldm.upscalers.Upscaler`, that draws the large picture with DDIM.

    tile, overlap: in pixels of the small picture; each evaluation of the network sees a tile. 0: all at once.
    Raises RequestError for numbers that cannot work, CheckpointError for models that are something else.
    """

    models: Models
    steps: int = 100
    eta: float = 1.0  # of DDIM; 0 adds no noise on the way, which gives smoother pictures
    seed: int = 0
    tile: int = 128
    overlap: int = 64

    name: str = field(init=False)
    factor: int = field(init=False, default=4)
    family: ClassVar[Family]

    def __post_init__(self) -> None:
        if self.models.family is not self.family:
            raise CheckpointError(
                f"{self.models.name} is {self.models.family.title}, not {self.family.title}"
            )
        if self.models.vae is None:
            raise CheckpointError(f"{self.models.name} holds no autoencoder; {self.name} needs its own")
        check_range("steps", self.steps, 1, len(self.models.denoiser.schedule.sigmas))
        check_range("eta", self.eta, 0, 1)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("tile", self.tile, 0, 100_000)
        if self.tile and not 0 <= self.overlap < self.tile:
            raise RequestError(
                f"tiles of {self.tile} pixels cannot overlap by {self.overlap}; make the tiles larger"
            )

    def __call__(self, image: Image.Image, progress: Progress | None = None) -> Image.Image:
        """The picture in RGB, four times as wide and high. progress: gets the share done, up to 1."""
        small = padded(to_tensor(image.convert("RGB"), self.models.device))
        tiles = len(grid(small.shape[2], small.shape[3], self.tile, self.overlap).boxes)
        total, done = tiles * (self.steps + 1), count(1)  # to decode a tile takes about as long as a step

        def tick(share: float) -> None:
            if progress is not None:
                progress(next(done) / total)

        *_, latent = second_try(
            self.models, lambda models: iter([replace(self, models=models).draw(small, tick)])
        )
        return self.decode(latent, self.factor * image.width, self.factor * image.height, tick)

    @abstractmethod
    def draw(self, small: Tensor, tick: Progress | None = None) -> Tensor:
        """The latent of the large picture, (1, C, h, w), from the small one.

        small: (1, 3, h, w) in [-1, 1], with sides as `padded` makes them.
        tick: called after each tile of each step.
        """

    @torch.no_grad()
    def sample(
        self, denoise: DenoiseBeside, small: Tensor, noise: GaussianNoise, tick: Progress | None
    ) -> Tensor:
        """The latent that a run of DDIM ends with; the denoiser sees a tile at a time."""
        sampler, channels = SAMPLERS["DDIM"], noise.shape[0]
        sigmas = sampler.sigmas(self.models.denoiser.schedule, self.steps)

        def in_tiles(x: Tensor, sigma: float) -> Tensor:
            return tiled(
                lambda both: denoise(both[:, :channels], both[:, channels:], sigma),
                torch.cat([x, small], dim=1),
                tile=self.tile,
                overlap=self.overlap,
                scale=1,
                progress=tick,
            )

        x = sampler.start(noise.draw(), sigmas[0])
        for step in sampler(in_tiles, x, sigmas, noise, eta=self.eta):
            x = step.x
        return finite(x, UNET)

    @torch.no_grad()
    def decode(self, latent: Tensor, width: int, height: int, tick: Progress | None = None) -> Image.Image:
        """The left top part, width x height pixels, of the picture of a latent (1, C, h, w)."""
        device, top = latent.device, 0
        image = Image.new("RGB", (width, height))
        for strip in tiled_strips(
            lambda z: decode(self.models, z.to(device)),
            latent.cpu(),  # so that only a tile of the large picture is on the device
            tile=self.tile,
            overlap=self.overlap,
            scale=self.factor,
            progress=tick,
        ):
            image.paste(to_pil(strip[0]), (0, top))  # what lies beyond the size is cut off
            top += strip.shape[2]
        return image


def padded(x: Tensor) -> Tensor:
    """Repeat the last column and row until both sides are multiples of 64, at least 128. (B, C, H, W)."""
    bottom, right = (max(SMALLEST, -(-side // MULTIPLE) * MULTIPLE) - side for side in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom), mode="replicate")
