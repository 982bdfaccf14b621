"""RRDBNet, the network of ESRGAN and Real-ESRGAN.

Dense blocks with residual connections at three scales, run at the small size; then the picture is doubled
and redoubled. Wang et al. 2018, arXiv:1809.00219, section 3.1; Real-ESRGAN, Wang et al. 2021,
arXiv:2107.10833, section 3.3, puts a pixel-unshuffle before it for factors below 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import CheckpointError

SLOPE = 0.2  # of the leaky ReLU, for inputs below 0 (arXiv:1809.00219 leaves it to the code)
RESIDUAL = 0.2  # what a block's result is scaled by before its input is added, "beta" in the paper


@dataclass(frozen=True, kw_only=True)
class RRDBConfig:
    """The shape of the network; the defaults are Real-ESRGAN x4plus."""

    features: int = 64
    blocks: int = 23
    growth: int = 32  # channels that each convolution of a dense block adds
    doublings: int = 2
    unshuffle: int = 1  # n x n pixels become channels first

    @property
    def factor(self) -> int:
        return 2**self.doublings // self.unshuffle


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees all results before it. (B, features, H, W) -> the same."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        for i in range(1, 5):
            self.add_module(f"conv{i}", nn.Conv2d(features + (i - 1) * growth, growth, 3, padding=1))
        self.conv5 = nn.Conv2d(features + 4 * growth, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.children()
        seen = x
        for conv in inner:
            seen = torch.cat([seen, F.leaky_relu(conv(seen), SLOPE)], dim=1)
        return x + RESIDUAL * last(seen)


class ResidualBlock(nn.Module):
    """The residual-in-residual dense block."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(features, growth)
        self.rdb2 = DenseBlock(features, growth)
        self.rdb3 = DenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, H * factor, W * factor), about in [0, 1]. RGB."""

    def __init__(self, config: RRDBConfig) -> None:
        super().__init__()
        self.config = config
        features = config.features
        self.conv_first = nn.Conv2d(3 * config.unshuffle**2, features, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(features, config.growth) for _ in range(config.blocks)))
        self.conv_body = nn.Conv2d(features, features, 3, padding=1)
        for i in range(1, config.doublings + 1):
            self.add_module(f"conv_up{i}", nn.Conv2d(features, features, 3, padding=1))
        self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)

    @property
    def factor(self) -> int:
        """Output pixels per input pixel along a side."""
        return self.config.factor

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        n = self.config.unshuffle
        x = F.pad(x, (0, -width % n, 0, -height % n), mode="replicate")
        x = self.conv_first(F.pixel_unshuffle(x, n))
        x = x + self.conv_body(self.body(x))
        for i in range(1, self.config.doublings + 1):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.leaky_relu(self.get_submodule(f"conv_up{i}")(x), SLOPE)
        x = self.conv_last(F.leaky_relu(self.conv_hr(x), SLOPE))
        return x[..., : height * self.factor, : width * self.factor]


def rrdb_config(shapes: Mapping[str, tuple[int, ...]]) -> RRDBConfig:
    """Read the configuration off the shapes of weights that are named as here.

    Raises CheckpointError if they are no such network of RGB pictures.
    """
    try:
        features, channels = shapes["conv_first.weight"][:2]
        growth = shapes["body.0.rdb1.conv1.weight"][0]
        colours = shapes["conv_last.weight"][0]
    except (KeyError, IndexError, ValueError):
        raise CheckpointError("the weights of an ESRGAN network are incomplete; get the file again") from None
    unshuffle = math.isqrt(channels // 3)
    if colours != 3 or channels != 3 * unshuffle**2 or unshuffle not in (1, 2, 4):
        raise CheckpointError(
            f"it turns pictures of {channels} channels into {colours}; only RGB (3 to 3) is supported"
        )
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("body.")})
    doublings = sum(re.fullmatch(r"conv_up\d+\.weight", name) is not None for name in shapes)
    if not unshuffle <= 2**doublings <= 16:
        raise CheckpointError(f"an ESRGAN network that doubles {doublings} times is not supported")
    return RRDBConfig(
        features=features, blocks=blocks, growth=growth, doublings=doublings, unshuffle=unshuffle
    )


OLD_NAMES = {  # of the code of 2018 to 2020, in which BSRGAN and many networks of that time are published
    r"RRDB_trunk\.(\d+)\.RDB(\d)\.": r"body.\1.rdb\2.",
    r"trunk_conv\.": "conv_body.",
    r"upconv(\d)\.": r"conv_up\1.",
    r"HRconv\.": "conv_hr.",
}


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an ESRGAN network under the names of RRDBNet, whichever of three ways they are named.

    `body.0.rdb1.conv1` (Real-ESRGAN), `RRDB_trunk.0.RDB1.conv1`, and the numbers of one long sequence in the
    first published networks: `model.1.sub.0.RDB1.conv1.0`. Other names stay as they are.
    """
    names = _numbered(weights) if "model.0.weight" in weights else OLD_NAMES
    patterns = [(re.compile(pattern), new) for pattern, new in names.items()]

    def rename(name: str) -> str:
        for pattern, new in patterns:
            if match := pattern.match(name):
                return match.expand(new) + name[match.end() :]
        return name

    return {rename(name): weight for name, weight in weights.items()}


def _numbered(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The patterns for the layout of numbers, which depend on how long the sequence is.

    model.0: the first convolution; model.1.sub: the blocks and the one that follows them; then for each
    doubling three places, of which the second holds weights; then two convolutions around an activation.
    """
    places = [int(match[1]) for name in weights if (match := re.fullmatch(r"model\.(\d{1,2})\.weight", name))]
    subs = [int(match[1]) for name in weights if (match := re.match(r"model\.1\.sub\.(\d+)\.", name))]
    last = max(places)
    return {
        r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.": r"body.\1.rdb\2.conv\3.",
        rf"model\.1\.sub\.{max(subs, default=0)}\.(?=weight|bias)": "conv_body.",
        r"model\.0\.": "conv_first.",
        **{rf"model\.{3 * i}\.": f"conv_up{i}." for i in range(1, (last - 4) // 3 + 1)},
        rf"model\.{last - 2}\.": "conv_hr.",
        rf"model\.{last}\.": "conv_last.",
    }
