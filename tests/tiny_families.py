"""Small random models of every family: `tiny("sdxl").save(path)` is a checkpoint in the original layout.

They are quick to build, save and run; only the vocabulary of the text encoders is of full size.
"""

from functools import cache

import torch
from torch import nn

from ldm.denoise import Denoiser, Prediction
from ldm.families import FAMILIES, BertPart, ClassPart, ClipPart, Family
from ldm.families.family import Part
from ldm.models import Models
from ldm.text.bert import BertConfig, BertTextModel
from ldm.text.clip import ClipTextConfig, ClipTextModel
from ldm.text.tokenizer import Tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.vae import AutoencoderKL, VAEConfig, VQModel

WIDTH = 64  # of each text encoder, and of the UNet's first level: one head of the families with wide heads

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
QUANTISED = ("class-f4", "class-f8", "unconditional", "ldsr")
THREE_CHANNELS = ("class-f4", "unconditional", "ldsr")  # of the latent


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer()


def unet_config(family: Family) -> UNetConfig:
    context = 128 if family.name == "embedded" else WIDTH * len(family.parts)
    vector = {"sdxl": WIDTH + 6 * 256, "sdxl-refiner": WIDTH + 5 * 256, "embedded": 128}.get(family.name)
    sd2_or_later = family.name.startswith(("sd2", "sdxl", "x4"))
    return UNetConfig(
        in_channels=family.in_channels,
        out_channels=3 if family.name in THREE_CHANNELS else 4,
        model_channels=WIDTH,
        channel_mult=(1, 1),
        num_res_blocks=1,
        depth=(0, 1),
        middle_depth=1,
        context_dim=context if family.parts else None,
        num_heads=family.num_heads,
        head_dim=family.head_dim,
        linear_projection=sd2_or_later,
        vector_dim=vector,
        num_classes=1000 if family.name == "x4-upscaler" else None,
    )


def vae_config(family: Family) -> VAEConfig:
    """As many levels as the published autoencoders: 8 pixels per latent pixel, or 4."""
    channels = 3 if family.name in THREE_CHANNELS else 4
    return VAEConfig(
        ch=32,
        ch_mult=(1, 1, 1) if channels == 3 or family.name in ("x4-upscaler", "embedded") else (1, 1, 1, 1),
        num_res_blocks=1,
        z_channels=channels,
        embed_dim=channels,
        codebook_size=16 if family.name in QUANTISED else None,
        scale=family.scale,
    )


def encoder(part: Part, width: int) -> nn.Module:
    match part:
        case ClipPart():
            return ClipTextModel(
                ClipTextConfig(
                    width=width,
                    layers=2,
                    heads=width // 64,
                    quick_gelu=part.quick_gelu,
                    projection_dim=width if part.openclip else None,
                )
            )
        case BertPart():
            return BertTextModel(BertConfig(width=width, layers=1))
        case ClassPart():
            return nn.Embedding(1001, width)


@cache
def tiny(name: str, prediction: Prediction | None = None) -> Models:
    """A model of the family, the same one each time. prediction: for the families that leave it open."""
    family = BY_NAME[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(unet_config(family))
        config = vae_config(family)
        vae = AutoencoderKL(config) if config.codebook_size is None else VQModel(config)
        width = 128 if name == "embedded" else WIDTH
        text = tuple(encoder(part, width) for part in family.parts)
    for module in (unet, vae, *text):
        module.eval().requires_grad_(False)
    denoiser = Denoiser(unet, family.schedule(), prediction or family.prediction or Prediction.EPS)
    clip = any(isinstance(part, ClipPart) for part in family.parts)
    return Models(family, denoiser, vae, text, tokenizer() if clip else None)
