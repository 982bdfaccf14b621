"""The ways to hold a model in memory and to run it, from the fastest to the smallest."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch

from ldm import offload
from ldm.checkpoint import load
from ldm.models import Limits, Models
from ldm.optimization import FastConv2d, optimize
from ldm.storage import held_in

USUAL = Limits()


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to hold a model and to run it."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    storage: torch.dtype | None = None
    fast: bool = False  # with ldm.optimize, on a CPU
    lowvram: Literal["parts", "blocks"] | None = None  # see ldm.offload
    limits: Limits = USUAL

    def load(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Models:
        """Load a model to be held and run like that. options: further ones of `ldm.load`."""
        home = "cpu" if self.lowvram else self.device
        models = load(path, device=home, dtype=self.dtype, storage=self.storage, **options)
        models = replace(models, limits=self.limits)
        if self.fast:
            optimize(models)
        return (
            offload.offloaded(models, self.device, blocks=self.lowvram == "blocks")
            if self.lowvram
            else models
        )

    def __str__(self) -> str:
        dtype, storage = (str(d).removeprefix("torch.") for d in (self.dtype, self.storage))
        held = {None: "held whole", "parts": "part by part", "blocks": "block by block"}[self.lowvram]
        facts = [
            f"weights in {storage if self.storage else dtype} on {self.device}",
            *([held] if self.lowvram else []),
            *(["made faster"] if self.fast else []),
            *([] if self.limits.whole else ["decoding in strips"]),
            *([] if self.limits.rows is None else [f"UNet batch of {self.limits.rows}"]),
        ]
        return ", ".join(facts)


def ways(device: str, *, fast: bool = False) -> Iterator[Way]:
    """To load a model, from the fastest way to the one that takes least memory."""
    half = Way(device=device, dtype=torch.float16)
    held = (
        [*([Way(fast=True)] if fast else []), Way(), Way(storage=torch.float16)]
        if device == "cpu"
        else [half, replace(half, lowvram="parts"), replace(half, lowvram="blocks")]
    )
    for way, limits in product(held, _limits()):
        yield replace(way, limits=limits)


def ways_of(models: Models) -> Iterator[Way]:
    """To run loaded models, in that order, too."""
    for limits in _limits():
        yield replace(way_of(models), limits=limits)


def way_of(models: Models) -> Way:
    """How they are held, and run."""
    blocks = offload.in_blocks(models.unet)
    return Way(
        device=str(models.device),
        dtype=models.denoiser.dtype,
        storage=held_in(models.unet),
        fast=any(isinstance(layer, FastConv2d) for layer in models.unet.modules()),
        lowvram=("blocks" if blocks else "parts") if offload.is_offloaded(models.unet) else None,
        limits=models.limits,
    )


def _limits() -> Iterator[Limits]:
    for whole, rows in product((USUAL.whole, 0), (None, 1)):
        yield Limits(rows, whole)
