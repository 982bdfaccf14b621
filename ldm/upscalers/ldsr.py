"""LDSR: latent diffusion draws a picture four times as large as the one that it is shown.

The small picture stands beside the noisy latent as three more input channels. Both have the same size, as
the latent of a picture is 1/4 of it: nothing has to be encoded. Trained to undo blur, noise and JPEG traces
of random strength (Rombach et al. 2022, arXiv:2112.10752, section 4.4 and appendix D.6), it invents detail
where an ordinary network only sharpens, at the price of many evaluations.

What the web UI's extension does (`ldsr_model_arch.py`, on CompVis's sampler) is done here, with these
differences:
- The original stops at training step 0, with a trace of noise in the latent; this goes on to none.
- Where tiles overlap, the original weighs by the distance to the nearest border, this by the product of two
  ramps. A picture of a single tile is not concerned.
- The result is rounded to 8 bits instead of cut off, and a seed makes it repeatable on every device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.checkpoint import load
from ldm.denoise import Conditioning
from ldm.errors import CheckpointError, RequestError
from ldm.families.original import LDSR as FAMILY
from ldm.formats import read
from ldm.images import to_pil
from ldm.models import Models
from ldm.noise import GaussianNoise
from ldm.request import MAX_SEED
from ldm.samplers import SAMPLERS
from ldm.tiles import grid, tiled, tiled_strips

MULTIPLE, SMALLEST = 64, 128  # the sides that the small picture is padded to: the original's choice


@dataclass(frozen=True)
class LDSR:
    """An upscaler, see `ldm.upscalers.Upscaler`.

    steps, eta: of DDIM; eta 0 adds no noise on the way, which gives smoother pictures.
    tile, overlap: in pixels of the small picture; each evaluation of the network sees a tile. 0: all at once.
    Raises RequestError for numbers that cannot work, CheckpointError for models that are something else.
    """

    models: Models
    steps: int = 100
    eta: float = 1.0
    seed: int = 0
    tile: int = 128
    overlap: int = 64

    name: str = field(default="LDSR", init=False)
    factor: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        if self.models.family is not FAMILY:
            raise CheckpointError(f"{self.models.name} is {self.models.family.title}, not LDSR")
        if self.models.vae is None:
            raise CheckpointError(f"{self.models.name} holds no autoencoder; LDSR needs its own")
        training_steps = len(self.models.denoiser.schedule.sigmas)
        for name, low, high in (("steps", 1, training_steps), ("eta", 0, 1), ("seed", 0, MAX_SEED)):
            if not low <= getattr(self, name) <= high:
                raise RequestError(f"{name} must be {low} to {high}, got {getattr(self, name)}")
        if self.tile and not 0 <= self.overlap < self.tile:
            raise RequestError(
                f"tiles of {self.tile} pixels cannot overlap by {self.overlap}; make the tiles larger"
            )

    def __call__(self, image: Image.Image, progress: Callable[[float], object] | None = None) -> Image.Image:
        """The picture in RGB, four times as wide and high. progress: gets the share done, up to 1."""
        small = padded(to_tensor(image))
        tiles = len(grid(small.shape[2], small.shape[3], self.tile, self.overlap).boxes)
        total, done = tiles * (self.steps + 1), count(1)  # decoding a tile takes about as long as a step

        def tick(share: float) -> None:
            if progress is not None:
                progress(next(done) / total)

        latent = self.draw(small.to(self.models.device), tick)
        return self.decode(latent, self.factor * image.width, self.factor * image.height, tick)

    @torch.no_grad()
    def draw(self, small: Tensor, tick: Callable[[float], object] | None = None) -> Tensor:
        """The latent of the large picture, (1, 3, h, w) as the small one.

        small: in [-1, 1], with sides as `padded` makes them. tick: called after each tile of each step.
        """
        denoiser, sampler, channels = self.models.denoiser, SAMPLERS["DDIM"], small.shape[1]

        def denoise(x: Tensor, sigma: float) -> Tensor:
            def of_tile(both: Tensor) -> Tensor:
                return denoiser(both[:, :channels], sigma, Conditioning(concat=both[:, channels:]))

            both = torch.cat([x, small], dim=1)  # (1, 6, h, w)
            return tiled(of_tile, both, tile=self.tile, overlap=self.overlap, scale=1, progress=tick)

        sigmas = sampler.sigmas(denoiser.schedule, self.steps)
        noise = GaussianNoise(small.shape[1:], [self.seed], device=small.device)
        x = sampler.start(noise.draw(), sigmas[0])
        for step in sampler(denoise, x, sigmas, noise, eta=self.eta):
            x = step.x
        return x

    @torch.no_grad()
    def decode(
        self, latent: Tensor, width: int, height: int, tick: Callable[[float], object] | None = None
    ) -> Image.Image:
        """The left top part, width x height pixels, of the picture of a latent (1, 3, h, w)."""
        vae, device, top = self.models.vae, latent.device, 0
        assert vae is not None
        image = Image.new("RGB", (width, height))
        for strip in tiled_strips(
            lambda z: vae.decode(z.to(device)),
            latent.cpu(),  # so that only a tile of the large picture is on the device
            tile=self.tile,
            overlap=self.overlap,
            scale=self.factor,
            progress=tick,
        ):
            image.paste(to_pil(strip[0]), (0, top))  # what lies beyond the size is cut off
            top += strip.shape[2]
        return image


def load_ldsr(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LDSR:
    """Load the published checkpoint, with its averaged weights (EMA) where it holds them, as the original.

    Raises CheckpointError if the file is damaged or not an LDSR model.
    """
    averaged = any(name.startswith("model_ema.") for name in read(path).tensors)
    return LDSR(load(path, device=device, ema=averaged))


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as (1, 3, H, W) float32 in [-1, 1]."""
    levels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
    return levels.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1


def padded(x: Tensor) -> Tensor:
    """Repeat the last column and row until both sides are multiples of 64, at least 128. (B, C, H, W)."""
    bottom, right = (max(SMALLEST, -(-side // MULTIPLE) * MULTIPLE) - side for side in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom), mode="replicate")
