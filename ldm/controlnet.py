"""Steering a model with a picture: ControlNet (Zhang, Rao and Agrawala 2023, arXiv:2302.05543).

A trained copy of the UNet's input half sees the noisy latent and a hint, such as the edges of what is to be
drawn. What it makes of them passes 1x1 convolutions that began as zero, and is added to the skip connections
and the middle of the UNet, which itself stays as it was. Parameter names are those of the original files.

Shapes: B batch, h w latent pixels, H W pixels of the hint.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm import t2i_adapter
from ldm.denoise import Network
from ldm.errors import RequestError
from ldm.hints import HINTS
from ldm.images import opaque
from ldm.offload import bring, device_of
from ldm.resize import Mode as Resize
from ldm.resize import resized
from ldm.t2i_adapter import Adapter
from ldm.unet import SD1_UNET, InputHalf, UNetConfig

Mode = Literal["balanced", "prompt", "control"]

SOFT = 0.825  # "prompt" and "control": each block counts this much less than the next deeper one (ControlNet)


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """Shape of a ControlNet; the defaults are those published for Stable Diffusion 1.x."""

    unet: UNetConfig = SD1_UNET  # of the model that it steers; the output half does not matter
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)  # of the hint's network; each but the first halves

    @property
    def factor(self) -> int:
        """How much larger than the latent the hint is, along one axis: that of the model's autoencoder."""
        return 2 ** (len(self.hint_widths) - 1)


def _hint_block(config: ControlNetConfig) -> nn.Sequential:
    """Eight convolutions in the published networks, with SiLU between: pixels to features of latent size."""
    widths = config.hint_widths
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), nn.SiLU()]
    for width, wider in pairwise(widths):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, wider, 3, padding=1, stride=2), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], config.unet.model_channels, 3, padding=1))


class ControlNet(InputHalf):
    """A UNet's input half with a second picture as input and one more output for each of its blocks."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.factor = config.factor
        self.input_hint_block = _hint_block(config)
        # Each alone in a sequence, for the sake of the names.
        self.zero_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 1)) for c in self.skips)
        self.middle_block_out = nn.Sequential(nn.Conv2d(self.skips[-1], self.skips[-1], 1))

    def features(self, hint: Tensor) -> Tensor:
        """What `forward` needs of a hint; the same at every step of a run.

        hint: (B or 1, 3, H, W) in [0, 1]. Returns (B or 1, model_channels, h, w), h = H / factor.
        """
        return self.input_hint_block(hint)

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """The residuals that `UNet.forward` takes as `control`: one for each input block, the middle's last.

        features: (B or 1, model_channels, h, w), see there. The rest: as in `UNet.forward`.
        Raises ValueError if context or y is missing or given in vain.
        """
        outputs = self.down(x, self.embedding(x, t, context, y), context, {0: features})
        layers = (*self.zero_convs, self.middle_block_out)
        return [layer(output) for layer, output in zip(layers, outputs, strict=True)]


@dataclass(frozen=True, eq=False)
class Control:
    """One hint for a run, and how much it counts.

    mode: "balanced"; "prompt": the finer blocks count less, so that the prompt decides more; "control": the
        same, and the negative half of guidance runs without the hint, so that guidance strengthens the hint,
        too. (The names of the web UI's ControlNet extension: "My prompt is more important", "ControlNet is
        more important".)

    Raises RequestError where a number makes no sense.
    """

    network: ControlNet | Adapter
    hint: Image.Image  # or the picture of which it is made; transparent parts of a hint count as black
    weight: float = 1.0  # 0 to 10; 0: the hint has no effect
    start: float = 0.0  # of the run, 0 to 1: where the hint begins to count ...
    end: float = 1.0  # ... and where it ends
    mode: Mode = "balanced"
    name: str = "unnamed"  # of the network, for the settings in the picture
    preprocessor: str = "none"  # makes the hint of the picture, once it fits; a name of ldm.hints.HINTS
    resize: Resize = "crop"  # how a picture of another shape is made to fit, see ldm.resize

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and 0 <= self.weight <= 10):
            raise RequestError(f"the weight of a control must be 0 to 10, got {self.weight}")
        if not 0 <= self.start < self.end <= 1:
            raise RequestError(
                f"a control needs 0 <= start < end <= 1, got start {self.start} and end {self.end}"
            )
        for name, choices in (
            ("mode", get_args(Mode)),
            ("resize", get_args(Resize)),
            ("preprocessor", tuple(HINTS)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise RequestError(f"{name} of a control must be {', '.join(choices)}, got {value!r}")

    def active(self, step: int, steps: int) -> bool:
        """Whether the hint counts in step 0, 1, ..., steps - 1: if all of it lies between start and end."""
        return self.weight > 0 and self.start <= step / steps and (step + 1) / steps <= self.end


@dataclass(frozen=True, eq=False)
class Prepared:
    """A control at work: its hint is encoded, which is done once for a run."""

    network: ControlNet
    features: Tensor  # (1, model_channels, h, w)
    scales: tuple[float, ...]  # of each residual

    def residuals(self, x: Tensor, t: Tensor, context: Tensor | None, y: Tensor | None) -> list[Tensor]:
        # Of an inpainting model's input, only the noisy latent: the ControlNet is the common model's.
        x = x[:, : self.network.config.in_channels]
        found = self.network(x, self.features, t, context, y)
        return [scale * residual for scale, residual in zip(self.scales, found, strict=True)]


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """The same of a T2I-Adapter: what it adds is the same at every step, too."""

    features: Mapping[int, Tensor]  # number of an input block -> (1, C, h, w), weighted


@torch.no_grad()
def prepared(
    control: Control, unet: UNetConfig, *, width: int, height: int, factor: int
) -> Prepared | PreparedAdapter:
    """Make a control ready for pictures of width x height pixels.

    unet, factor: of the model that runs, and of its autoencoder.
    Raises RequestError if the ControlNet or adapter is for another model.
    """
    network = control.network
    check_fit(network, unet, factor)
    dtype = next(network.parameters()).dtype
    hint = to_hint(control, width, height).to(device_of(network), dtype)
    if isinstance(network, ControlNet):
        bring(network)
        return Prepared(network, network.features(hint), scales(control, len(network.skips) + 1))
    found = network(hint)
    weighted = (weight * one for weight, one in zip(scales(control, len(found)), found, strict=True))
    blocks = unet.num_res_blocks  # of each level, and a halving; the last ResBlock takes the features
    return PreparedAdapter({level * (blocks + 1) + blocks: one for level, one in enumerate(weighted)})


def check_fit(network: ControlNet | Adapter, unet: UNetConfig, factor: int | None) -> None:
    """Raise RequestError if a network is not for this UNet and an autoencoder of this factor, if known."""
    own = network.config
    facts = [
        ("levels of width", own.widths, unet.widths),
        ("pixels per latent pixel:", network.factor, factor or network.factor),
    ]
    if isinstance(own, UNetConfig):
        facts += [
            ("text of width", own.context_dim, unet.context_dim),
            ("a vector of width", own.vector_dim, unet.vector_dim),
            ("ResBlocks per level:", own.num_res_blocks, unet.num_res_blocks),
        ]
    kind = "ControlNet" if isinstance(network, ControlNet) else "T2I-Adapter"
    for what, theirs, ours in facts:
        if theirs != ours:
            raise RequestError(
                f"the {kind} is for another model: it has {what} {theirs}, the model {ours}; "
                "use one made for this model"
            )


def to_hint(control: Control, width: int, height: int) -> Tensor:
    """The hint of a control for pictures of this size: (1, 3, height, width) float32 in [0, 1], RGB.

    The picture is made to fit first and turned into a hint then: thin lines would fade if they were shrunk.
    """
    image = opaque(control.hint, "black" if control.preprocessor == "none" else "white")
    image = HINTS[control.preprocessor](resized(image, width, height, control.resize))
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)


def scales(control: Control, count: int) -> tuple[float, ...]:
    """How much each of `count` residuals or features counts, those of the deepest block last.

    In the soft modes weight * 0.825^(count - 1 - i): what the original code writes for 13 residuals (its
    "guess mode"), counted from the middle for any number of them; for an adapter see `t2i_adapter.SOFT`.
    """
    if control.mode == "balanced":
        return (control.weight,) * count
    if isinstance(control.network, Adapter):
        return tuple(control.weight * soft for soft in t2i_adapter.SOFT)
    return tuple(control.weight * SOFT ** (count - 1 - i) for i in range(count))


@dataclass(frozen=True, eq=False)
class Controlled:
    """A network under one or several controls, which add up; called like the network itself."""

    network: Network
    controls: Sequence[Prepared | PreparedAdapter]

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        adapter: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """As `UNet.forward`; `control` and `adapter`: those of others, added too."""
        residuals = [] if control is None else [[*control]]
        features = dict(adapter or {})
        for one in self.controls:
            if isinstance(one, Prepared):
                residuals.append(one.residuals(x, t, context, y))
            else:
                features |= {i: f + features[i] if i in features else f for i, f in one.features.items()}
        total = [reduce(torch.add, parts) for parts in zip(*residuals, strict=True)]
        return self.network(x, t, context, y, total or None, features or None)
