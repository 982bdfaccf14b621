"""Between two passes: a finished latent becomes the start of a larger one ("hires fix" of the web UI)."""

from collections.abc import Mapping
from types import MappingProxyType

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.images import to_pil
from ldm.latents import decode, encode
from ldm.models import Models
from ldm.planning import Plan, autoencoder, step_of_sizes
from ldm.upscalers import Upscaler, enlarged, upscaler_named

LATENT_MODES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "Latent": ("bilinear", False),
        "Latent (antialiased)": ("bilinear", True),
        "Latent (bicubic)": ("bicubic", False),
        "Latent (bicubic antialiased)": ("bicubic", True),
        "Latent (nearest)": ("nearest", False),
        "Latent (nearest-exact)": ("nearest-exact", False),
    }
)
"""Upscalers that work on the latent: (mode of torch's interpolate, antialiased)."""


def load(models: Models, run: Plan) -> Upscaler | None:
    """What enlarges the pictures between two passes; None: there is no second one, or it starts from latents.

    Raises LdmError if there is no such upscaler.
    """
    hires = run.request.hires
    if hires is None or hires.upscaler in LATENT_MODES:
        return None
    return upscaler_named(hires.upscaler, models.library, device=models.device)


def larger_latents(models: Models, run: Plan, latents: Tensor, upscaler: Upscaler | None) -> Tensor:
    """Finished latents (B, C, h, w) at the size of the second pass. upscaler: see `load`."""
    assert run.request.hires is not None
    if upscaler is not None:
        return encode(models, [larger_picture(models, run, latent, upscaler) for latent in latents])
    mode, antialias = LATENT_MODES[run.request.hires.upscaler]
    factor = autoencoder(models).config.factor
    step = step_of_sizes(models, run.request)
    width, height = (side // factor for side in run.request.hires.target(run.width, run.height, step))
    latents = F.interpolate(latents, size=(height, width), mode=mode, antialias=antialias)
    w, h = (side // factor for side in run.request.hires.size(run.width, run.height, step))
    left, top = (width - w) // 2, (height - h) // 2
    return latents[:, :, top : top + h, left : left + w]


def larger_picture(models: Models, run: Plan, latent: Tensor, upscaler: Upscaler | None) -> Image.Image:
    """A finished latent (C, h, w) as a picture of the size of the second pass. upscaler: see `load`."""
    hires = run.request.hires
    assert hires is not None
    if upscaler is None:
        latent = larger_latents(models, run, latent.unsqueeze(0), None)[0]
    image = to_pil(decode(models, latent.unsqueeze(0))[0], truncate=run.request.compat.truncate_8bit)
    if upscaler is None:
        return image
    step = step_of_sizes(models, run.request)
    width, height = hires.target(run.width, run.height, step)
    image = enlarged(image, upscaler, width, height)
    w, h = hires.size(run.width, run.height, step)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))
