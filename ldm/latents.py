"""Pixels to latents and back, for the parts of a model at hand."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ldm import tiled_vae
from ldm.images import to_tensor
from ldm.models import Models
from ldm.planning import autoencoder
from ldm.vae import AutoencoderKL, VQModel

WHOLE = 6 * 2**30
"""Bytes of memory up to which a picture is decoded as a whole; beyond, in strips, in twice the time."""


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) float32, nominally in [-1, 1]. One picture at a time."""
    vae = autoencoder(models)
    whole = _memory(vae, latents.shape[2] * latents.shape[3] * vae.config.factor**2) <= WHOLE
    parts = (z.unsqueeze(0).float() for z in latents)
    return torch.cat([vae.decode(z) if whole else tiled_vae.decode(vae, z) for z in parts])


@torch.no_grad()
def encode(models: Models, images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to latents (B, C, h, w) float32, on the model's device. One at a time.

    The size must be a multiple of the autoencoder's factor. Of its Gaussian the mean is taken, where the
    original code draws a sample: the difference cannot be seen, and the result is always the same.
    """
    vae = autoencoder(models)
    whole = _memory(vae, images[0].width * images[0].height) <= WHOLE
    parts = (to_tensor(image, models.device) for image in images)
    return torch.cat([vae.encode(x) if whole else tiled_vae.encode(vae, x) for x in parts])


def _memory(vae: AutoencoderKL | VQModel, pixels: int) -> int:
    """About how many bytes a decoder needs: seven numbers for each pixel and channel of its widest map."""
    return 30 * vae.config.ch * pixels  # 3.9 GB measured at 1024 x 1024 with 128 channels
