"""The recipe of the embedded model: from the packed data set to the file that `ldm.load()` reads.

Three stages, each resumable: the autoencoder on crops, the latents of all pictures, text encoder and UNet on
the latents. Two scopes with the same code: SMALL is what two CPU cores reach in hours, FULL wants a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.checkpoint import load_vae
from ldm.denoise import Denoiser, Prediction
from ldm.errors import LdmError
from ldm.families.sd1 import EMBEDDED
from ldm.formats import read, write_safetensors
from ldm.models import Models
from ldm.schedules import NoiseSchedule
from ldm.text.clip import ClipTextConfig
from ldm.text.tokenizer import Tokenizer
from ldm.training.autoencoder import train_autoencoder
from ldm.training.diffusion import LatentViews, TextToImage, encode_views, train_diffusion
from ldm.training.icons import IconSet
from ldm.training.loop import LoopConfig, rank_and_world
from ldm.unet import UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Everything that decides the model but the data."""

    pixels: int
    vae: VAEConfig
    vae_loop: LoopConfig
    vae_batch: int
    crop: int  # pixels of the autoencoder's training windows
    coloured: int  # views of each picture on a named colour
    unet: UNetConfig
    text: ClipTextConfig
    loop: LoopConfig
    batch: int


# Group norm has 32 groups: a level of 32 channels would lose the mean of each channel, so 64 is the least.
# Captions are short: with 77 positions nine tenths of what a pixel attends to would be padding. And the
# vector of the whole text, added to the time embedding as in SDXL, soon teaches a small network what to draw.
SMALL = Scope(
    pixels=64,
    vae=VAEConfig(ch=64, ch_mult=(1, 1, 2), num_res_blocks=1, mid_attention=False),
    vae_loop=LoopConfig(steps=1300, lr=6e-4, warmup=50, ema_decay=0.995, weight_decay=0.0, save_every=200),
    vae_batch=64,
    crop=32,
    coloured=3,
    unet=UNetConfig(
        model_channels=64,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        depth=(0, 1, 1),
        context_dim=128,
        num_heads=4,
        vector_dim=128,
        scale_shift_norm=True,
    ),
    text=ClipTextConfig(width=128, layers=2, heads=2, context_length=24, quick_gelu=True),
    loop=LoopConfig(steps=6900, lr=8e-4, warmup=100, ema_decay=0.998, save_every=125),
    batch=64,
)
FULL = Scope(
    pixels=128,
    vae=VAEConfig(ch=64, ch_mult=(1, 1, 2, 2), num_res_blocks=1, mid_attention=False),
    vae_loop=LoopConfig(steps=6000, lr=4e-4, warmup=200, ema_decay=0.999, weight_decay=0.0, save_every=500),
    vae_batch=256,
    crop=64,
    coloured=3,
    unet=UNetConfig(
        model_channels=64,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        depth=(0, 1, 1),
        context_dim=128,
        num_heads=4,
        vector_dim=128,
        scale_shift_norm=True,
    ),
    text=ClipTextConfig(width=128, layers=4, heads=2, context_length=24, quick_gelu=True),
    loop=LoopConfig(steps=40_000, lr=1e-3, warmup=500, ema_decay=0.9995, save_every=1000),
    batch=1024,
)
SCOPES: Mapping[str, Scope] = {"small": SMALL, "full": FULL}


def train_default_model(
    data: IconSet,
    scope: Scope,
    folder: Path,
    *,
    device: torch.device,
    seconds: float,
    compile: bool,
    preview_every: int,
    watch: Callable[[Models], None] = lambda models: None,
) -> Models | None:
    """Go on with the recipe in `folder` for about `seconds`. Returns the finished model, or None.

    `folder` holds the state of each stage. Every `preview_every` steps of the last one, the model as it is
    goes to preview.safetensors there: a checkpoint like any other, to look at. `watch` gets it, too.
    """
    if data.images.shape[-1] != scope.pixels:
        raise LdmError(f"this scope needs pictures of {scope.pixels} px, got {data.images.shape[-1]}")
    vae = _autoencoder(data, scope, folder, device, seconds)
    if vae is None:
        return None
    views = latent_views(vae, data, scope, folder)

    def preview(model: TextToImage) -> None:
        models = assemble(vae, model)
        models.save(folder / "preview.safetensors", dtype=torch.float16, overwrite=True)
        watch(models)

    model, done = train_diffusion(
        views,
        scope.unet,
        scope.text,
        scope.loop,
        folder / "diffusion",
        batch_size=scope.batch,
        device=device,
        seconds=seconds,
        compile=compile,
        every=(preview_every, preview),
    )
    return assemble(vae, model) if done else None


def assemble(vae: AutoencoderKL, model: TextToImage) -> Models:
    """The trained parts as a model like any loaded one."""
    denoiser = Denoiser(model.unet, NoiseSchedule.scaled_linear(), Prediction.V)
    return Models(EMBEDDED, denoiser, vae, (model.text,), Tokenizer())


def _autoencoder(
    data: IconSet, scope: Scope, folder: Path, device: torch.device, seconds: float
) -> AutoencoderKL | None:
    finished = folder / "vae.safetensors"
    if finished.exists():
        loaded = load_vae(finished, device=device)
        assert isinstance(loaded, AutoencoderKL)
        return loaded
    vae = train_autoencoder(
        data,
        scope.vae,
        scope.vae_loop,
        folder / "vae",
        batch_size=scope.vae_batch,
        crop=scope.crop,
        device=device,
        seconds=seconds,
    )
    if vae is not None and rank_and_world()[0] == 0:
        write_safetensors(finished, vae.state_dict())
    return vae


def latent_views(vae: AutoencoderKL, data: IconSet, scope: Scope, folder: Path) -> LatentViews:
    """The latents, cached in `folder`: they follow from the autoencoder, the data and the seed."""
    cache = folder / "latents.safetensors"
    icons = [data.icons[i] for i in data.indices(holdout=False)]
    if cache.exists():
        file = read(cache)
        z, colours = file.tensors.get("z"), file.metadata.get("colours")
        if z is None or colours is None or len(z) != len(icons):
            raise LdmError(f"{cache} holds the latents of other pictures; delete it")
        return LatentViews(icons, z, [line.split(",") for line in colours.split(";")])
    views = encode_views(vae, data, coloured=scope.coloured, seed=scope.loop.seed)
    if rank_and_world()[0] == 0:
        write_safetensors(cache, {"z": views.z}, {"colours": ";".join(map(",".join, views.colours))})
    return views
