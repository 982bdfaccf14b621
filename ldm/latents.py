"""Pixels to latents and back, for the parts of a model at hand."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ldm import tiled_vae
from ldm.finite import with_autoencoder
from ldm.images import to_tensor
from ldm.models import Models
from ldm.planning import autoencoder
from ldm.vae import AutoencoderKL, VQModel

WHOLE = 6 * 2**30
"""Bytes of memory up to which a picture is decoded as a whole; beyond, in strips, in twice the time."""


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) float32, nominally in [-1, 1]. One picture at a time.

    Raises NotFiniteError if there is NaN or infinity among them, also after a second try in float32.
    """

    def decoded(vae: AutoencoderKL | VQModel, z: Tensor) -> Tensor:
        whole = _memory(vae, z.shape[2] * z.shape[3] * vae.config.factor**2) <= WHOLE
        return vae.decode(z) if whole else tiled_vae.decode(vae, z)

    return torch.cat([with_autoencoder(autoencoder(models), decoded, z.unsqueeze(0)) for z in latents])


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

    def encoded(vae: AutoencoderKL | VQModel, x: Tensor) -> Tensor:
        whole = _memory(vae, x.shape[2] * x.shape[3]) <= WHOLE
        return vae.encode(x) if whole else tiled_vae.encode(vae, x)

    return with_autoencoder(autoencoder(models), encoded, pixels)


def _memory(vae: AutoencoderKL | VQModel, pixels: int) -> int:
    """About how many bytes a decoder needs: seven numbers for each pixel and channel of its widest map."""
    return 30 * vae.config.ch * pixels  # 3.9 GB measured at 1024 x 1024 with 128 channels
