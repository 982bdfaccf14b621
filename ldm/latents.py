"""Pixels to latents and back, for the parts of a model at hand."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ldm.finite import with_autoencoder
from ldm.images import to_tensor
from ldm.models import Models
from ldm.planning import autoencoder
from ldm.vae import AutoencoderKL, VQModel


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) float32, nominally in [-1, 1]. One picture at a time.

    Raises NotFiniteError if there is NaN or infinity among them, also after a second try in float32.
    """

    def one(z: Tensor) -> Tensor:
        return with_autoencoder(autoencoder(models), lambda vae: vae.decode(_like(vae, z.unsqueeze(0))))

    return torch.cat([one(z) for z in latents])


@torch.no_grad()
def encode(models: Models, images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to latents (B, C, h, w) float32, on the model's device. One at a time.

    The size must be a multiple of the autoencoder's factor. Of its Gaussian the mean is taken, where the
    original code draws a sample: the difference cannot be seen, and the result is always the same.
    Raises NotFiniteError as `decode` does.
    """
    return torch.cat([encoded(models, to_tensor(image, models.device)) for image in images])


@torch.no_grad()
def encoded(models: Models, pixels: Tensor) -> Tensor:
    """The same for pixels (1, 3, H, W) in [-1, 1]."""
    return with_autoencoder(autoencoder(models), lambda vae: vae.encode(_like(vae, pixels)))


def _like(vae: AutoencoderKL | VQModel, x: Tensor) -> Tensor:
    return x.to(next(vae.parameters()).dtype)
