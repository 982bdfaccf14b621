"""The Stable Diffusion x4 upscaler: latent diffusion that is also told in words what the picture shows.

The small picture stands beside the noisy latent with some noise of its own, whose level the network is told
as a class number. More of it hides the flaws of the small picture, and lets the network invent more (Saharia
et al. 2021, arXiv:2104.07636, and Ho et al. 2021, arXiv:2106.15282, section 4, "conditioning augmentation").

The settings are those of Stability AI's model card and of diffusers' StableDiffusionUpscalePipeline, which
this is compared with. It differs from diffusers in tiles, in padding (that of Stability's own script) and in
going on to no noise at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ldm.denoise import Conditioning
from ldm.errors import CheckpointError, check_range
from ldm.families import Picture
from ldm.families.sd2 import X4_UPSCALER
from ldm.guidance import Guides, cfg
from ldm.noise import GaussianNoise, torch_stream
from ldm.upscalers.latent import LatentUpscaler
from ldm.upscalers.upscaler import Progress

MAX_NOISE_LEVEL = 350  # of the training; the levels beyond have no trained class


@dataclass(frozen=True)
class X4Upscaler(LatentUpscaler):
    """The upscaler, from `ldm.load(path)`.

    noise_level: of the small picture, a step 0 to 350 of the network's own schedule.
    Raises PromptError for a prompt that cannot work when it is used.
    """

    steps: int = 75
    eta: float = 0.0
    prompt: str = ""
    negative_prompt: str = ""
    noise_level: int = 20
    cfg_scale: float = 9.0

    name: str = field(init=False, default="Stable Diffusion x4")
    family = X4_UPSCALER

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models.text:
            raise CheckpointError(f"{self.models.name} holds no text encoder; {self.name} needs its own")
        check_range("noise_level", self.noise_level, 0, MAX_NOISE_LEVEL)
        check_range("cfg_scale", self.cfg_scale, 0, 1000)

    @torch.no_grad()
    def draw(self, small: Tensor, tick: Progress | None = None) -> Tensor:
        denoiser = self.models.denoiser
        positive = self._conditioning(self.prompt, small, negative=False)
        negative = self._conditioning(self.negative_prompt, small, negative=True)

        def denoise(x: Tensor, beside: Tensor, sigma: float) -> Tensor:
            guides = Guides.one(replace(positive, concat=beside), replace(negative, concat=beside))
            return cfg(denoiser, guides, self.cfg_scale)(x, sigma)

        # One stream for both noises, that of the small picture first.
        stream, sigma = torch_stream(self.seed), denoiser.schedule.sigmas[self.noise_level]
        noise_beside = stream(small.shape[1:]).to(small.device)
        beside = (small + sigma * noise_beside) / math.sqrt(1 + sigma**2)
        shape = (self.models.unet.config.out_channels, *small.shape[2:])
        noise = GaussianNoise(shape, [self.seed], device=small.device, stream=lambda _: stream)
        return self.sample(denoise, beside, noise, tick)

    def _conditioning(self, prompt: str, small: Tensor, *, negative: bool) -> Conditioning:
        """Of the text and of the noise level, for a batch of one."""
        width, height = self.factor * small.shape[3], self.factor * small.shape[2]
        picture = Picture(width=width, height=height, negative=negative, clip_skip=None)
        text = self.family.condition(self.models.text, self.models.tokenizer, prompt, picture)
        return replace(text, vector=torch.tensor([self.noise_level], device=small.device))
