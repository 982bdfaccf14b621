"""How much memory a run will take, told before anything is loaded, and how to make it fit.

    predict(sizes("v1-5-pruned-emaonly.safetensors"), request, Way())  # bytes
    way = fit("v1-5-pruned-emaonly.safetensors", request, budget=4 * 2**30, device="cuda")
    models = way.load("v1-5-pruned-emaonly.safetensors")

The sizes of weights come from the names and shapes in the file. What the networks need while they run grows
with the pixels, by factors that were measured (benchmarks/memory.py; docs/memory.md compares them with the
truth). Not counted: what Python and torch
take by themselves, 0.3 GB, and pages of the file while it is read, which the system may drop.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from ldm.checkpoint import DEFAULT_MODEL, load, named, normalised
from ldm.errors import CheckpointError, RequestError
from ldm.families import Family, recognise
from ldm.families.family import UNET, VAE
from ldm.families.infer import unet_config, vae_config
from ldm.formats import read
from ldm.latents import memory as decoding
from ldm.models import Limits, Models
from ldm.offload import offloaded
from ldm.request import Request
from ldm.storage import SMALL
from ldm.tiled_vae import STRIP
from ldm.unet import UNetConfig
from ldm.vae import KL_F8, VAEConfig

FIXED = 150 * 2**20
"""Bytes that a first run takes, whatever its size: torch's code, threads and scratch memory, a tokenizer."""

UNET_NUMBERS = 45
"""Numbers that a UNet holds at once for each latent pixel and channel of its first level."""

USUAL = Limits()
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """What decides the memory of a model."""

    family: Family
    unet: UNetConfig
    vae: VAEConfig
    shapes: Shapes  # of all weights in use

    def part(self, name: str) -> Shapes:
        """The weights of "unet", "vae" or "text"."""
        prefixes = {"unet": (UNET,), "vae": (VAE,), "text": tuple(part.prefix for part in self.family.parts)}
        return {key: shape for key, shape in self.shapes.items() if key.startswith(prefixes[name])}

    def blocks(self) -> list[Shapes]:
        """The UNet's weights by the blocks that `ldm.offload` moves."""
        groups: dict[str, Shapes] = {}
        for key, shape in self.part("unet").items():
            first, second, *_ = key.removeprefix(UNET).split(".")
            block = f"{first}.{second}" if first in ("input_blocks", "output_blocks") else first
            groups.setdefault(block, {})[key] = shape
        return [*groups.values()]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to hold a model and to run it."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    storage: torch.dtype | None = None
    lowvram: Literal["parts", "blocks"] | None = None  # see ldm.offload
    limits: Limits = USUAL

    def load(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Models:
        """Load a model to be held and run like that. options: further ones of `ldm.load`."""
        home = "cpu" if self.lowvram else self.device
        models = load(path, device=home, dtype=self.dtype, storage=self.storage, **options)
        models = replace(models, limits=self.limits)
        return offloaded(models, self.device, blocks=self.lowvram == "blocks") if self.lowvram else models


def sizes(path: str | os.PathLike[str] | None = None) -> Sizes:
    """Of a checkpoint, without loading it; None: the embedded model. Raises CheckpointError."""
    source = DEFAULT_MODEL if path is None else Path(path)
    shapes = {name: tuple(w.shape) for name, w in normalised(read(source)).items()}
    try:
        family = recognise(shapes)
        unet = {name.removeprefix(UNET): s for name, s in shapes.items() if name.startswith(UNET)}
        vae = {name.removeprefix(VAE): s for name, s in shapes.items() if name.startswith(VAE)}
        return Sizes(
            family,
            unet_config(unet, num_heads=family.num_heads, head_dim=family.head_dim),
            vae_config(vae, scale=family.scale) if vae else KL_F8,
            shapes,
        )
    except CheckpointError as error:
        raise named(source, error) from None


def predict(model: Sizes, request: Request, way: Way) -> int:
    """Bytes that a run takes at most on its device, weights included. Only the first pass is looked at."""

    def weights(shapes: Shapes, dtype: torch.dtype) -> int:
        return sum(
            prod(shape) * (way.storage if way.storage and _stored(key, shape) else dtype).itemsize
            for key, shape in shapes.items()
        )

    text, unet = (weights(model.part(part), way.dtype) for part in ("text", "unet"))
    vae = weights(model.part("vae"), torch.float32)
    steps, pixels = working(model, request, way)
    if way.storage:  # one layer at a time is brought to the dtype it is computed in
        steps += max(prod(shape) for shape in model.part("unet").values()) * way.dtype.itemsize
    if way.lowvram is None:
        return FIXED + text + unet + vae + max(steps, pixels)
    if way.lowvram == "blocks":
        unet = max(weights(block, way.dtype) for block in model.blocks())
    return FIXED + max(text, unet + steps, vae + pixels)


def working(model: Sizes, request: Request, way: Way) -> tuple[int, int]:
    """Bytes that the networks take while they run, beside weights: a step of the UNet, decoding a picture."""
    usual = model.family.size
    area = (request.width or usual) * (request.height or usual)
    scale = model.family.cfg_scale if request.cfg_scale is None else request.cfg_scale
    rows = request.batch_size * (1 if scale == 1 or not model.family.parts else 2)
    rows = min(rows, way.limits.rows or rows)
    latent = area // model.vae.factor**2
    steps = UNET_NUMBERS * way.dtype.itemsize * model.unet.model_channels * rows * latent
    whole = decoding(model.vae, area)
    if whole <= way.limits.whole:
        return steps, whole
    return steps, whole // 3 + 10 * 4 * STRIP  # see ldm.tiled_vae


def fit(path: str | os.PathLike[str] | None, request: Request, *, budget: int, device: str = "cpu") -> Way:
    """The fastest way to run a request in that many bytes. None of them changes more than a rounding.

    Raises RequestError if there is none, with the least that is needed.
    """
    model, least = sizes(path), None
    for way in ways(device):
        need = predict(model, request, way)
        if need <= budget:
            return way
        least = min(need, least or need)
    raise RequestError(
        f"this needs {(least or 0) / 2**30:.1f} GB of memory at least, there is {budget / 2**30:.1f}; "
        "try a smaller picture"
    )


def ways(device: str) -> Iterator[Way]:
    """From the fastest to the one that takes least memory."""
    half = Way(device=device, dtype=torch.float16)
    held = (
        [Way(), Way(storage=torch.float16)]
        if device == "cpu"
        else [half, replace(half, lowvram="parts"), replace(half, lowvram="blocks")]
    )
    for way, whole, rows in product(held, (USUAL.whole, 0), (None, 1)):
        yield replace(way, limits=Limits(rows, whole))


def _stored(key: str, shape: tuple[int, ...]) -> bool:
    """Whether `ldm.storage` holds this weight in fewer bytes."""
    return len(shape) > 1 and prod(shape) >= SMALL and "embedding" not in key
