"""What the tests of LoRA training share: kinds of networks, networks as if trained, made-up data."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.families import Picture
from ldm.models import Models
from ldm.training.lora import (
    LoraConfig,
    Snapshot,
    encoded,
)
from ldm.training.lora_data import DataConfig, Dataset, Drawn, Example
from ldm.training.lora_network import LoraNetwork, NetworkConfig

LORA = NetworkConfig(network_dim=4, network_alpha=2.0)
LOCON = replace(LORA, conv_dim=2, conv_alpha=3.0)
DORA = replace(LOCON, dora=True)
KINDS = {"lora": LORA, "locon": LOCON, "dora": DORA}
FAMILIES = ("embedded", "sd1", "sd2", "sdxl")
CASES = [*((family, "locon") for family in FAMILIES), ("sd1", "lora"), ("sdxl", "dora"), ("embedded", "dora")]
CONFIG = LoraConfig(unet_lr=1e-3, text_encoder_lr=5e-4, epochs=2, batch_size=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seen(text: str = "a red cat, sitting", **sizes: tuple[int, int]) -> Drawn:
    picture = Picture(width=64, height=64, negative=False, clip_skip=None, **sizes)  # pyright: ignore[reportArgumentType]
    return Drawn(torch.randn(4, 8, 8, generator=generator()), text, picture, prior=False)


def output(models: Models) -> Tensor:
    """Of the text encoders and the UNet, for fixed inputs."""
    told = encoded(models, [seen(), seen("dog")], None)
    x = torch.randn(2, 4, 8, 8, generator=generator(1))
    return models.unet(x, torch.tensor([100.0, 900.0]), told.context, told.vector)


def randomised(models: Models, config: NetworkConfig) -> LoraNetwork:
    """A network as if it had been trained."""
    network = LoraNetwork(models, config)
    with torch.no_grad():
        for name, p in network.named_parameters():
            change = 0.1 * torch.randn(p.shape, generator=generator(len(name)))
            p.copy_(p * (1 + change) if "dora" in name else p + change)
    return network


def snapshot(network: LoraNetwork) -> Snapshot:
    return Snapshot(1, 1, dict(network.state_dict()))


def dataset(counts: tuple[int, ...] = (3, 2), prior: int = 0, **settings: float) -> Dataset:
    """Random latents in two buckets; `counts` are repeats."""
    config = DataConfig(resolution=64, bucket_step=8, min_bucket=32, max_bucket=128, **settings)  # pyright: ignore[reportArgumentType]
    items = [
        Example(Path(f"{i}.png"), f"a cat, number {i}, sitting", "3_cat", repeats, i >= len(counts), (64, 64))
        for i, repeats in enumerate([*counts, *[1] * prior])
    ]
    shapes = [(8, 8) if i % 2 else (4, 16) for i in range(len(items))]
    latents = [torch.randn(2, 4, *shape, generator=generator(i)).half() for i, shape in enumerate(shapes)]
    buckets = [(8 * w, 8 * h) for h, w in shapes]
    return Dataset(config, items, buckets, latents, "the same")
