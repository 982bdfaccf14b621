"""Every kind of weight file that the library reads, tiny and good, with what reads it.

Files that are sound as files, but hold other tensors than they should, are made of these by `altered`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import ldm
from ldm import lora, textual_inversion
from ldm.checkpoint import load_vae
from ldm.clip_vision import ClipVisionConfig, ClipVisionModel
from ldm.controlnet import ControlNet, ControlNetConfig
from ldm.controlnet_file import load_controlnet
from ldm.formats import write_safetensors
from ldm.interrogate import load_clip
from ldm.t2i_adapter import Adapter, AdapterConfig
from ldm.text.clip import ClipTextConfig, ClipTextModel
from ldm.unet import UNet
from ldm.upscalers import load_upscaler
from ldm.upscalers.compact import CompactConfig, CompactNet
from ldm.upscalers.esrgan import RRDBConfig, RRDBNet
from tests.tiny_families import tiny


class Reader(NamedTuple):
    """A kind of file: the weights of a good one, and what reads it to the end."""

    weights: dict[str, Tensor]
    read: Callable[[Path], object]


def merge(path: Path) -> None:
    with lora.applied(tiny("sd1"), [(path, 1.0)]):
        pass


@cache
def readers() -> dict[str, Reader]:
    torch.manual_seed(0)
    sd1, classes = tiny("sd1"), tiny("class-f8")
    assert sd1.vae is not None
    assert classes.vae is not None
    widths = ControlNetConfig().hint_widths[:4]
    control = ControlNet(ControlNetConfig(unet=sd1.unet.config, hint_widths=widths))
    four_levels = replace(sd1.unet.config, channel_mult=(1, 1, 1, 1), depth=(0, 0, 0, 1))
    with_four = replace(sd1, denoiser=replace(sd1.denoiser, network=UNet(four_levels)))
    adapter = Adapter(AdapterConfig(widths=four_levels.widths))
    place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    added = {
        f"{place}.lora_down.weight": torch.randn(2, 64),
        f"{place}.lora_up.weight": torch.randn(64, 2),
        f"{place}.alpha": torch.tensor(2.0),
    }
    return {
        "checkpoint": Reader(classes.state_dict(), ldm.load),
        "autoencoder": Reader(sd1.vae.state_dict(), load_vae),
        "lora": Reader(added, merge),
        "embedding": Reader({"emb_params": torch.randn(2, 64)}, textual_inversion.read),
        "controlnet": Reader(control.state_dict(), lambda path: load_controlnet(path, sd1)),
        "adapter": Reader(adapter.state_dict(), lambda path: load_controlnet(path, with_four)),
        "esrgan": Reader(RRDBNet(RRDBConfig(features=8, blocks=1, growth=4)).state_dict(), load_upscaler),
        "compact": Reader(
            CompactNet(CompactConfig(features=8, convolutions=1, factor=2)).state_dict(), load_upscaler
        ),
        "clip": Reader(clip(), load_clip),
    }


def clip() -> dict[str, Tensor]:
    """Names as in the files of transformers."""
    text = ClipTextConfig(width=64, layers=1, heads=1, projection_dim=16)
    vision = ClipVisionConfig(
        image_size=28, patch=7, width=64, mlp_width=128, layers=1, heads=1, projection_dim=16
    )
    halves = ClipTextModel(text).state_dict() | ClipVisionModel(vision).state_dict()
    # Some of them come with whatever was in memory.
    drawn = {name: 0.1 * torch.randn_like(w) for name, w in halves.items()}
    return {**drawn, "logit_scale": torch.tensor(4.6)}


def altered(rng: random.Random, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights but for a few that are missing, misnamed, or of another shape, kind or value."""
    weights = dict(weights)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        name = rng.choice(list(weights))
        w = weights[name]
        match rng.randrange(12):
            case 0:
                del weights[name]
            case 1:
                weights[name] = w.reshape(-1)
            case 2:
                weights[name] = w.unsqueeze(rng.choice((0, -1)))
            case 3:
                weights[name] = torch.zeros(())
            case 4:
                weights[name] = torch.zeros(0)
            case 5:
                weights[name] = torch.zeros((*w.shape[:-1], 0))
            case 6:
                weights[name] = w.to(rng.choice((torch.int64, torch.bool, torch.uint8, torch.complex64)))
            case 7:
                weights[name] = torch.cat([w, w]) if w.dim() else w.expand(3)
            case 8:
                weights[name] = w.narrow(0, 0, 1) if w.dim() and len(w) else w
            case 9:
                weights[name] = w * rng.choice((float("nan"), float("inf"), 1e38))
            case 10:
                weights[rng.choice((name + "x", "x" + name, name[:-1], name.replace("1", "9")))] = w
            case 11:
                weights[name] = w.transpose(0, -1).contiguous() if w.dim() > 1 else w
        if not weights:
            weights["x"] = w
    return weights


def save(path: Path, weights: dict[str, Tensor]) -> Path:
    write_safetensors(path, {name: w.contiguous() for name, w in weights.items()}, overwrite=True)
    return path
