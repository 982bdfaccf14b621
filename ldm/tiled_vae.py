"""The autoencoder for large pictures: the same result, a third of the memory.

An autoencoder cannot be cut into tiles as a plain convolutional network can. Its group norms divide by the
standard deviation of the *whole* picture, so a tile with its own statistics comes out in other colours; and
the statistics of a smaller copy of the picture are not those of the picture (docs/textures.md has figures).
So each layer, not the picture, is cut: into strips, as wide as the picture, that overlap by as many rows as
the convolutions reach. A norm is measured over all strips before any of them passes it. What remains in
memory is one feature map before a block and one after it, instead of the four or five that torch needs.
Attention sees everything at once as ever: it only comes where maps are small.

Nothing is approximated. The price is time: what lies before a norm is computed again after it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.vae import AutoencoderKL, Codebook, Decoder, Encoder, Level, Middle, ResnetBlock, Upsample, VQModel

VAE = AutoencoderKL | VQModel
Layer = Callable[[Tensor], Tensor]
Progress = Callable[[float], object]

# Rows of its input that a stage reaches up and down: two 3x3 convolutions, or three at twice the resolution.
# Even, because the encoder halves strips.
HALO = 2

# Numbers in one strip of a feature map: 32 MB in float32. A map no larger than this is not cut.
STRIP = 2**23


def decode(vae: VAE, z: Tensor, *, strip: int = STRIP, progress: Progress | None = None) -> Tensor:
    """`vae.decode(z)` from less memory, equal but for rounding; to the bit where nothing is cut.

    strip: numbers in one strip of a feature map, at least; memory beside the maps is about ten times that.
    progress: is called now and then with the share that is done, up to 1.
    """
    return _in_strips(vae, strip, progress).decode(z)


def encode(
    vae: VAE,
    x: Tensor,
    noise: Tensor | None = None,
    *,
    strip: int = STRIP,
    progress: Progress | None = None,
) -> Tensor:
    """`vae.encode(x)` from less memory, see `decode`. noise: only for an `AutoencoderKL`, see there."""
    twin = _in_strips(vae, strip, progress)
    return twin.encode(x, noise) if isinstance(twin, AutoencoderKL) else twin.encode(x)


def _in_strips(vae: VAE, strip: int, progress: Progress | None) -> VAE:
    """The same autoencoder, on the same weights, which works in strips."""
    twin = copy.deepcopy(vae, {id(weight): weight for weight in vae.parameters()})
    strips = _Strips(strip, torus=vae.decoder.conv_in.padding_mode == "circular")
    twin.add_module("encoder", _Chain(_encoder(twin.encoder, strips), progress))
    twin.add_module("decoder", _Chain(_decoder(twin.decoder, strips), progress))
    if isinstance(twin, VQModel):
        twin.add_module("quantize", _Chain([partial(_quantize, twin.quantize, strips)], None))
    return twin


@dataclass(frozen=True)
class _Strips:
    """How feature maps are cut."""

    size: int  # numbers in a strip
    torus: bool  # what lies above the first row is the last row (see seamless.py)

    def each(self, layer: Layer, x: Tensor) -> Iterator[Tensor]:
        """`layer(x)` from top to bottom in strips. The layer may double or halve width and height."""
        height = x.shape[2]
        rows = max(self.size * height // x.numel() // 2 * 2, 4 * HALO)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            if self.torus:
                around = torch.arange(top - HALO, bottom + HALO, device=x.device) % height
                strip, above = x[:, :, around], HALO
            else:
                above = min(top, HALO)
                strip = x[:, :, top - above : bottom + HALO]
            part = layer(strip)
            factor = part.shape[2] / strip.shape[2]
            yield part.narrow(2, int(above * factor), int((bottom - top) * factor))

    def map(self, layer: Layer, x: Tensor) -> Tensor:
        """`layer(x)`, see `each`."""
        if x.numel() <= self.size:
            return layer(x)
        whole, done = None, 0
        for part in self.each(layer, x):
            if whole is None:
                height = x.shape[2] * part.shape[3] // x.shape[3]
                whole = part.new_empty(*part.shape[:2], height, part.shape[3])
            whole[:, :, done : done + part.shape[2]] = part
            done += part.shape[2]
        assert whole is not None
        return whole

    def norm(self, norm: nn.GroupNorm, before: Layer, x: Tensor) -> Layer:
        """The norm for strips of `before(x)`, with the statistics of the whole.

        Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", equation 2.1.
        """
        count, mean, var = 0, torch.zeros(()), torch.zeros(())
        for part in self.each(before, x):
            groups = part.float().unflatten(1, (norm.num_groups, -1)).flatten(2)
            new_var, new_mean = torch.var_mean(groups, dim=2, correction=0)  # (B, groups)
            count += groups.shape[2]
            share = groups.shape[2] / count
            delta = new_mean - mean.to(new_mean)
            var = torch.lerp(var.to(new_var), new_var, share) + delta.square() * share * (1 - share)
            mean = new_mean - delta * (1 - share)
        per_group = norm.num_channels // norm.num_groups
        weight = (var + norm.eps).rsqrt().repeat_interleave(per_group, dim=1) * norm.weight.float()  # (B, C)
        bias = norm.bias.float() - mean.repeat_interleave(per_group, dim=1) * weight
        weight, bias = weight[:, :, None, None], bias[:, :, None, None]
        return lambda h: torch.addcmul(bias, h.float(), weight).to(h.dtype)

    def resnet(self, block: ResnetBlock, before: Layer, x: Tensor) -> Tensor:
        """`block(before(x))`."""
        if isinstance(before, Upsample):  # the map inside has four times as many numbers as x
            self = replace(self, size=self.size // 4)
        if x.numel() <= self.size:
            return block(before(x))
        norm1 = self.norm(block.norm1, before, x)

        def first(h: Tensor) -> Tensor:
            return block.conv1(F.silu(norm1(h)))

        norm2 = self.norm(block.norm2, lambda strip: first(before(strip)), x)

        def both(strip: Tensor) -> Tensor:
            h = before(strip)
            return block.nin_shortcut(h) + block.conv2(F.silu(norm2(first(h))))

        return self.map(both, x)

    def head(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """The end of an encoder or decoder."""
        if x.numel() <= self.size:
            return conv(F.silu(norm(x)))
        measured = self.norm(norm, nn.Identity(), x)
        return self.map(lambda strip: conv(F.silu(measured(strip))), x)


class _Chain(nn.Module):
    """Stages one after the other, the input of each freed as soon as it is done."""

    def __init__(self, stages: list[Layer], progress: Progress | None) -> None:
        super().__init__()
        self.stages = stages
        self.progress = progress

    def forward(self, x: Tensor) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.progress is not None:
                # Blocks of all levels cost about the same: where a map is larger, it has fewer channels.
                self.progress((i + 1) / len(self.stages))
        return x


def _encoder(encoder: Encoder, strips: _Strips) -> list[Layer]:
    stages: list[Layer] = [partial(strips.map, encoder.conv_in)]
    for level in cast(Sequence[Level], encoder.down):
        stages += [*_level(level, nn.Identity(), strips), partial(strips.map, level.downsample)]
    return [*stages, *_middle(encoder.mid, strips), partial(strips.head, encoder.norm_out, encoder.conv_out)]


def _decoder(decoder: Decoder, strips: _Strips) -> list[Layer]:
    stages: list[Layer] = [partial(strips.map, decoder.conv_in), *_middle(decoder.mid, strips)]
    # The map after an Upsample is the largest of all. It is never held, but made anew for each pass.
    upsample: nn.Module = nn.Identity()
    for level in reversed(cast(Sequence[Level], decoder.up)):
        stages += _level(level, upsample, strips)
        upsample = level.upsample
    return [*stages, partial(strips.head, decoder.norm_out, decoder.conv_out)]


def _level(level: Level, before: Layer, strips: _Strips) -> list[Layer]:
    stages: list[Layer] = []
    for i, block in enumerate(cast(Sequence[ResnetBlock], level.block)):
        stages.append(partial(strips.resnet, block, nn.Identity() if i else before))
        stages += list(level.attn[i : i + 1])
    return stages


def _middle(middle: Middle, strips: _Strips) -> list[Layer]:
    one, two = (partial(strips.resnet, block, nn.Identity()) for block in (middle.block_1, middle.block_2))
    return [one, middle.attn_1, two]


def _quantize(codebook: Codebook, strips: _Strips, z: Tensor) -> Tensor:
    # Its largest map has a channel for each code.
    codes, width = codebook.embedding.weight.shape
    return replace(strips, size=strips.size * width // codes).map(codebook, z)
