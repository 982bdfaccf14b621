"""What an upscaler is, and the two common kinds: a filter, and a network that sees tiles of the picture."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError, RequestError
from ldm.tiles import tiled_strips
from ldm.upscalers.compact import CompactNet
from ldm.upscalers.esrgan import RRDBNet

Network = RRDBNet | CompactNet
"""Each has a `config` and a `factor`, and turns (B, 3, H, W) in [0, 1] into the same, that much larger."""

Progress = Callable[[float], object]  # called with the share that is done, up to 1

logger = logging.getLogger(__name__)


class Upscaler(Protocol):
    """Makes pictures larger by a fixed whole number. `ldm.upscalers.enlarged` makes any size of that."""

    @property
    def name(self) -> str: ...

    @property
    def factor(self) -> int:
        """How many times as wide and as high the result is."""
        ...

    def __call__(self, image: Image.Image, progress: Progress | None = None) -> Image.Image:
        """The picture in RGB, `factor` times as large. Transparency is left out."""
        ...


@dataclass(frozen=True)
class Filter:
    """An upscaler without a network."""

    name: str
    filter: Image.Resampling
    factor: int = 4

    def __call__(self, image: Image.Image, progress: Progress | None = None) -> Image.Image:
        size = (self.factor * image.width, self.factor * image.height)
        return image.convert("RGB").resize(size, self.filter)


@dataclass(frozen=True)
class NetworkUpscaler:
    """A network that reads and draws RGB pictures. Memory on its device does not grow with the picture.

    tile, overlap: in pixels of the small picture, see `ldm.tiles.grid`; tile 0: the whole picture at once.
    Raises RequestError if they make no grid.
    """

    name: str
    network: Network
    tile: int = 192  # the web UI's sizes
    overlap: int = 8

    def __post_init__(self) -> None:
        if self.tile < 0 or (self.tile and not 0 <= self.overlap < self.tile):
            raise RequestError(
                f"tiles of {self.tile} pixels cannot overlap by {self.overlap}; make the tiles larger"
            )

    @property
    def factor(self) -> int:
        return self.network.factor

    def __call__(self, image: Image.Image, progress: Progress | None = None) -> Image.Image:
        """The picture in RGB, `factor` times as large.

        Raises LdmError if the network gives NaN or infinity.
        """
        levels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
        result, top = Image.new("RGB", (self.factor * image.width, self.factor * image.height)), 0
        for strip in tiled_strips(
            self._enlarge,
            levels.permute(2, 0, 1).unsqueeze(0),
            tile=self.tile,
            overlap=self.overlap,
            scale=self.factor,
            progress=progress,
        ):
            rows = (strip[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)  # (rows, W, 3)
            result.paste(Image.fromarray(rows.numpy()), (0, top))
            top += len(rows)
        return result

    @torch.inference_mode()
    def _enlarge(self, levels: Tensor) -> Tensor:
        """(1, 3, h, w) in 0 to 255 -> (1, 3, h * factor, w * factor) float32, about in [0, 1]."""
        weight = next(self.network.parameters())
        pixels = levels.to(weight.device).float() / 255
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # convolutions are faster on it
        result = self.network(pixels.to(weight.dtype)).float()
        if torch.isfinite(result).all():
            return result
        if weight.dtype != torch.float32:
            logger.warning(
                f"{self.name}: NaN or infinity in {weight.dtype}; this tile is repeated in float32"
            )
            result = copy.deepcopy(self.network).float()(pixels)
            if torch.isfinite(result).all():
                return result
        raise LdmError(f"the upscaler {self.name} gave NaN or infinity; its file may be damaged")


def interpolated(first: NetworkUpscaler, second: NetworkUpscaler, share: float) -> NetworkUpscaler:
    """A network between two: `share` of the first one's weights and the rest of the second one's.

    For networks that were trained from one another. Between realesr-general-x4v3 and realesr-general-wdn-x4v3
    `share` is the strength of denoising. Wang et al. 2018, arXiv:1809.00219, section 3.4.

    Raises RequestError if the share is not in [0, 1] or the networks differ in shape.
    """
    if not 0 <= share <= 1:
        raise RequestError(f"the share must be 0 to 1, got {share}")
    if first.network.config != second.network.config:
        raise RequestError(f"{first.name} and {second.name} differ in shape; there is nothing between them")
    network = copy.deepcopy(first.network)
    with torch.no_grad():
        for weight, other in zip(network.parameters(), second.network.parameters(), strict=True):
            weight.lerp_(other.to(weight), 1 - share)
    return replace(first, name=f"{first.name} {share:g} {second.name}", network=network)
