"""The networks that are measured, at the size of Stable Diffusion 1.5, with random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.peers_worker import empty

# Diffusers and transformers look for it, and break where it does not fit to torch.
sys.modules["torchvision"] = None  # type: ignore[assignment]


class Setting(NamedTuple):
    """How much to do."""

    rounds: int
    quick: bool

    @property
    def levels(self) -> tuple[int, ...]:
        """Widths of the UNet."""
        return (64, 128, 256, 256) if self.quick else (320, 640, 1280, 1280)

    def side(self, pixels: int) -> int:
        """Of a latent."""
        return pixels // (32 if self.quick else 8)


def randomised(make: Callable[[], nn.Module]) -> Any:
    """A network with random weights that keep the size of what passes, made without initialising twice."""
    network = empty(make)
    torch.manual_seed(0)
    for p in network.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            p.zero_()
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
    return network


def our_unet(setting: Setting) -> Any:
    from ldm.unet import UNet, UNetConfig

    return randomised(lambda: UNet(UNetConfig(model_channels=setting.levels[0])))


def their_unet(setting: Setting) -> Any:
    """Diffusers' UNet, with nothing in it yet."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(block_out_channels=setting.levels, cross_attention_dim=768)


def shared_unets(setting: Setting) -> tuple[Any, Any]:
    """Ours and diffusers', on the same tensors."""
    from ldm.rename import to_diffusers

    ours, theirs = our_unet(setting), their_unet(setting)
    weights = {to_diffusers(name, ours.config): w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)
    return ours, theirs.eval().requires_grad_(False)


def our_vae(setting: Setting) -> Any:
    from ldm.vae import AutoencoderKL, VAEConfig

    return randomised(lambda: AutoencoderKL(VAEConfig(ch=32 if setting.quick else 128)))


def their_vae(setting: Setting) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    widths = (32, 64, 128, 128) if setting.quick else (128, 256, 512, 512)
    return randomised(
        lambda: AutoencoderKL(
            block_out_channels=widths,  # type: ignore[arg-type]
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * 4,  # type: ignore[arg-type]
        )
    )
