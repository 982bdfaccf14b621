"""SRVGGNetCompact: a single line of convolutions at the small size, fast on any machine.

The networks realesr-general-x4v3 (32 inner convolutions) and realesr-animevideov3 (16) of Real-ESRGAN, whose
repository is the only description: https://github.com/xinntao/Real-ESRGAN (`archs/srvgg_arch.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """The shape of the network; the defaults are realesr-animevideov3."""

    features: int = 64
    convolutions: int = 16  # between the first and the last one
    factor: int = 4


class CompactNet(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, H * factor, W * factor), about in [0, 1]. RGB."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        features, inputs = config.features, [3] + [config.features] * config.convolutions
        layers: list[nn.Module] = []
        for channels in inputs:
            layers += [nn.Conv2d(channels, features, 3, padding=1), nn.PReLU(features)]
        self.body = nn.Sequential(*layers, nn.Conv2d(features, 3 * config.factor**2, 3, padding=1))

    @property
    def factor(self) -> int:
        """Output pixels per input pixel along a side."""
        return self.config.factor

    def forward(self, x: Tensor) -> Tensor:
        # The network draws what is to be added to the picture with larger pixels.
        return F.pixel_shuffle(self.body(x), self.factor) + F.interpolate(x, scale_factor=self.factor)


def compact_config(shapes: Mapping[str, tuple[int, ...]]) -> CompactConfig:
    """Read the configuration off the shapes of weights.

    Raises CheckpointError if they are no such network of RGB pictures.
    """
    layers = [shape for name, shape in shapes.items() if name.endswith(".weight")]
    convolutions = sum(len(shape) == 4 for shape in layers)
    last = shapes.get(f"body.{2 * convolutions - 2}.weight", ())  # activations stand between them
    if convolutions < 2 or not last:
        raise CheckpointError("it looks like SRVGGNetCompact without its PReLU weights; get another file")
    first, outputs = shapes["body.0.weight"], last[0]
    features, channels = first[:2] if len(first) == 4 else (0, 0)
    factor = math.isqrt(outputs // 3)
    if channels != 3 or outputs != 3 * factor**2 or not 1 <= factor <= 16:
        raise CheckpointError(
            f"it turns pictures of {channels} channels into another kind; only RGB (3 to 3) is supported"
        )
    return CompactConfig(features=features, convolutions=convolutions - 2, factor=factor)
