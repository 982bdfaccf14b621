"""Steering a model with a picture by a small network: T2I-Adapter (Mou et al. 2023, arXiv:2302.08453).

Unlike a ControlNet it sees the hint alone, so it runs once for a whole picture: what it finds, one set of
features for each level, is added inside the UNet at every step. Parameter names are those of the original
files, of which there are two kinds, "full" and "light".

Shapes: H W pixels of the hint, h w latent pixels.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import CheckpointError
from ldm.families.infer import Shapes, length, reading

FACTOR = 8  # pixels of the hint per latent pixel, along one axis: that of Stable Diffusion's autoencoders
SOFT = (0.25, 0.62, 0.825, 1.0)  # of the four levels, in the soft modes of the web UI's ControlNet extension


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Shape of an adapter; the defaults are those published for Stable Diffusion 1.x."""

    hint_channels: int = 3  # 1 for edges and sketches
    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # of the levels, the UNet's
    num_res_blocks: int = 2  # in each level
    light: bool = False


class ResBlock(nn.Module):
    """Two convolutions and a shortcut, on half of the input's resolution if `down`."""

    def __init__(self, in_channels: int, channels: int, *, kernel: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.in_conv = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        # Rounded up, as the UNet's own halving is; the original fails at odd sizes.
        x = self.in_conv(F.avg_pool2d(x, 2, ceil_mode=True) if self.down else x)
        return x + self.block2(F.relu(self.block1(x)))


class LightLevel(nn.Module):
    """A level of a light adapter: its ResBlocks are a quarter as wide as what comes out."""

    def __init__(self, in_channels: int, channels: int, num_res_blocks: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        inner = channels // 4
        self.in_conv = nn.Conv2d(in_channels, inner, 1)
        self.body = nn.Sequential(
            *(ResBlock(inner, inner, kernel=3, down=False) for _ in range(num_res_blocks))
        )
        self.out_conv = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.down else x
        return self.out_conv(self.body(self.in_conv(x)))


class Adapter(nn.Module):
    """From a hint to features for each level of the UNet."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = FACTOR
        channels = config.hint_channels * FACTOR**2
        self.body = nn.ModuleList()
        if not config.light:
            self.conv_in = nn.Conv2d(channels, config.widths[0], 3, padding=1)
            channels = config.widths[0]
        for level, width in enumerate(config.widths):
            if config.light:
                self.body.append(LightLevel(channels, width, config.num_res_blocks, down=level > 0))
                channels = width
                continue
            for i in range(config.num_res_blocks):
                self.body.append(ResBlock(channels, width, kernel=1, down=level > 0 and i == 0))
                channels = width

    def forward(self, hint: Tensor) -> list[Tensor]:
        """Features for each level i: (1, widths[i], h / 2^i, w / 2^i). hint: (1, 3, H, W) in [0, 1]."""
        hint = hint if self.config.hint_channels == 3 else hint.mean(dim=1, keepdim=True)
        x = F.pixel_unshuffle(hint, FACTOR)
        x = x if self.config.light else self.conv_in(x)
        outputs = []
        for layer in self.body:
            x = layer(x)
            outputs.append(x)
        each = len(self.body) // len(self.config.widths)
        return outputs[each - 1 :: each]


def is_adapter(names: Iterable[str]) -> bool:
    """Whether the names are those of an adapter, in the original layout or that of diffusers."""
    return any(re.match(r"(adapter\.)?body\.0\.(block1|body\.0|resnets\.0)\b", name) for name in names)


def original_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names in diffusers' layout, where ResBlocks are grouped by level, as those of the original."""
    if not any(".resnets." in name for name in weights):
        return dict(weights)
    light = any(".out_conv." in name for name in weights)
    each = length(
        {name: tuple(w.shape) for name, w in weights.items()}, "adapter.body.0.resnets.{}.block1.weight"
    )

    def renamed(name: str) -> str:
        name = name.removeprefix("adapter.")
        if light:
            return name.replace(".resnets.", ".body.")
        match = re.match(r"body\.(\d+)(?:\.resnets\.(\d+))?", name)
        if match is None:
            return name
        return f"body.{int(match[1]) * each + int(match[2] or 0)}{name[match.end() :]}"

    return {renamed(name): w for name, w in weights.items()}


def adapter_config(shapes: Shapes) -> AdapterConfig:
    """The configuration of an adapter. Raises CheckpointError if the names make none."""
    light = "conv_in.weight" not in shapes
    with reading("T2I-Adapter"):
        channels = shapes["body.0.in_conv.weight" if light else "conv_in.weight"][1] // FACTOR**2
        count = length(shapes, "body.{}.out_conv.weight" if light else "body.{}.block1.weight")
        blocks = length(shapes, "body.0.body.{}.block1.weight") if light else count // len(SOFT)
        names = [f"body.{i}.out_conv.weight" if light else f"body.{i}.block1.weight" for i in range(count)]
        widths = [shapes[name][0] for name in names]
    if channels not in (1, 3) or not count or count % len(SOFT) or (light and count != len(SOFT)):
        raise CheckpointError("this T2I-Adapter is of another kind, such as SDXL's, which ldm does not read")
    return AdapterConfig(
        hint_channels=channels,
        widths=tuple(widths if light else widths[::blocks]),
        num_res_blocks=blocks,
        light=light,
    )
