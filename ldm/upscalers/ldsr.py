"""LDSR: latent diffusion draws a picture four times as large as the one that it is shown.

Trained to undo blur, noise and JPEG traces of random strength (Rombach et al. 2022, arXiv:2112.10752, section
4.4 and appendix D.6), it invents detail where an ordinary network only sharpens, at the price of many
evaluations.

What the web UI's extension does (`ldsr_model_arch.py`, on CompVis's sampler) is done here: noise first, 100
steps of DDIM with eta 1, padding, tiles, the averaged weights. The differences:
- The original stops at training step 0, with a trace of noise in the latent; this goes on to none.
- Where tiles overlap, the original weighs by the distance to the nearest border, this by the product of two
  ramps. A picture of a single tile is not concerned.
- The result is rounded to 8 bits instead of cut off, and a seed makes it repeatable on every device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.denoise import Conditioning
from ldm.families.original import LDSR as FAMILY
from ldm.noise import GaussianNoise
from ldm.upscalers.latent import LatentUpscaler
from ldm.upscalers.upscaler import Progress


@dataclass(frozen=True)
class LDSR(LatentUpscaler):
    """The upscaler; `ldm.upscalers.load_latent` makes one from its checkpoint."""

    name: str = field(init=False, default="LDSR")
    family = FAMILY

    @torch.no_grad()
    def draw(self, small: Tensor, tick: Progress | None = None) -> Tensor:
        def denoise(x: Tensor, beside: Tensor, sigma: float) -> Tensor:
            return self.models.denoiser(x, sigma, Conditioning(concat=beside))

        noise = GaussianNoise(small.shape[1:], [self.seed], device=small.device)
        return self.sample(denoise, small, noise, tick)
