"""Pixels to latents and back, for the parts of a model at hand."""

import copy
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import offload, tiled_vae
from ldm.finite import with_autoencoder
from ldm.images import to_tensor
from ldm.models import Models
from ldm.planning import autoencoder
from ldm.stepdown import first_that_fits
from ldm.vae import AutoencoderKL, VAEConfig, VQModel

VAE = AutoencoderKL | VQModel


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) float32, nominally in [-1, 1]. One picture at a time.

    In strips where the whole would take more memory than `models.limits` allows or than there is.
    Raises NotFiniteError if there is NaN or infinity among them, also after a second try in float32.
    """

    def decoded(vae: VAE, z: Tensor) -> Tensor:
        pixels = z.shape[2] * z.shape[3] * vae.config.factor**2
        return _frugally(models, vae, pixels, z, type(vae).decode, tiled_vae.decode)

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

    def encoded(vae: VAE, x: Tensor) -> Tensor:
        return _frugally(models, vae, x.shape[2] * x.shape[3], x, type(vae).encode, tiled_vae.encode)

    return with_autoencoder(autoencoder(models), encoded, pixels)


def memory(config: VAEConfig, pixels: int) -> int:
    """About how many bytes it takes to decode a picture whole, in float32, beside the weights.

    That is seven numbers for each pixel and channel of the widest map.
    """
    return 30 * config.ch * pixels  # 3.9 GB measured at 1024 x 1024 with 128 channels


def _frugally(
    models: Models,
    vae: VAE,
    pixels: int,
    x: Tensor,
    whole: Callable[..., Tensor],
    in_strips: Callable[..., Tensor],
) -> Tensor:
    """What the autoencoder makes of x, in the fastest way for which there is memory; all give the same."""
    offload.bring(vae)
    ways = {
        "the VAE whole": lambda: whole(vae, x),
        "the VAE in strips": lambda: in_strips(vae, x),
        "the VAE in narrow strips": lambda: in_strips(vae, x, strip=tiled_vae.STRIP // 8),
    }
    if memory(vae.config, pixels) > models.limits.whole:
        del ways["the VAE whole"]
    if x.device.type != "cpu":
        ways["the VAE on the CPU"] = lambda: in_strips(_on_cpu(vae), x.cpu().float()).to(x)
    return first_that_fits(vae, ways)


def _on_cpu(vae: VAE) -> VAE:
    """A copy in float32 on the CPU, made without memory of the device."""
    copies = {id(w): nn.Parameter(w.to("cpu", torch.float32), requires_grad=False) for w in vae.parameters()}
    return copy.deepcopy(vae, copies)
