"""Pixels to latents and back, for the parts of a model at hand."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ldm.images import to_tensor
from ldm.models import Models
from ldm.planning import autoencoder


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) float32, nominally in [-1, 1]. One picture at a time."""
    vae = autoencoder(models)
    return torch.cat([vae.decode(z.unsqueeze(0).float()) for z in latents])


@torch.no_grad()
def encode(models: Models, images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to latents (B, C, h, w) float32, on the model's device. One at a time.

    The size must be a multiple of the autoencoder's factor. Of its Gaussian the mean is taken, where the
    original code draws a sample: the difference cannot be seen, and the result is always the same.
    """
    vae = autoencoder(models)
    return torch.cat([vae.encode(to_tensor(image, models.device)) for image in images])
