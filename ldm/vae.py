"""The autoencoders: pixels <-> latents.

An `Encoder` halves the picture level by level, a `Decoder` doubles it back; both are convolutional ResNets
with one self-attention layer in the middle (Rombach et al. 2022, arXiv:2112.10752, section 3.1, appendix G).
`AutoencoderKL` describes each latent by a Gaussian (Stable Diffusion), `VQModel` snaps it to a codebook
(the first latent diffusion models). Parameter names are those of the original checkpoints.

Shapes: B batch, C channels, H W pixels, h w latent pixels (h = H / config.factor).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of an autoencoder; the defaults are Stable Diffusion's kl-f8."""

    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, in units of `ch`; each is half as large
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()  # levels with attention after every ResNet block (f16: the lowest)
    mid_attention: bool = True  # vq-f4-noattn has none
    z_channels: int = 4  # channels inside encoder and decoder
    embed_dim: int = 4  # channels of the latent itself
    codebook_size: int | None = None  # None: a Gaussian latent; otherwise VQ
    scale: float = 0.18215  # latent * scale has unit variance (Rombach et al. 2022, appendix G)

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along one axis: 8 for Stable Diffusion."""
        return 2 ** (len(self.ch_mult) - 1)


KL_F8 = VAEConfig()


def group_norm(channels: int) -> nn.GroupNorm:
    # eps is 1e-6 in the autoencoders but 1e-5 in the UNet's ResBlocks.
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut. (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels. (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # With the strides of a transposed tensor, torch would build the whole (HW, HW) matrix in memory.
        q, k, v = (conv(h).flatten(2).transpose(1, 2).contiguous() for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # (B, HW, C)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Strided convolution. (B, C, H, W) -> (B, C, H // 2, W // 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # The encoder pads right and bottom only; symmetric padding would sample another grid.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution: ResNet blocks, each followed by attention where the config asks for it."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()  # replaced by the encoder in all levels but the last
        self.upsample: nn.Module = nn.Identity()  # replaced by the decoder in all levels but the first

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn) > 0:
                h = self.attn[i](h)
        return self.upsample(self.downsample(h))


class Middle(nn.Module):
    """ResNet block, attention, ResNet block at the lowest resolution."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H / factor, W / factor)."""

    def __init__(self, config: VAEConfig, out_channels: int) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            below = widths[i - 1] if i > 0 else config.ch
            level = Level(below, width, config.num_res_blocks, i in config.attention_levels)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], config.mid_attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, in_channels, h * factor, w * factor)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.mid_attention)
        self.up = nn.ModuleList()  # up.0 is the full resolution: the data flow from the end of the list
        for i, width in enumerate(widths):
            below = widths[min(i + 1, len(widths) - 1)]
            level = Level(below, width, config.num_res_blocks + 1, i in config.attention_levels)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Autoencoder with a Gaussian latent (Kingma and Welling 2013, arXiv:1312.6114)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, 2 * config.z_channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unscaled latent, each (B, embed_dim, h, w); pixels as in `encode`."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # the original's guard against exp overflow

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Turn pixels into latents.

        x: (B, 3, H, W) in [-1, 1]; H and W multiples of `config.factor`.
        noise: (B, embed_dim, h, w), standard normal, to draw a sample; None takes the mean.
        Returns (B, embed_dim, h, w) of about unit variance (multiplied by `config.scale`).
        """
        mean, logvar = self.moments(x)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return z * self.config.scale

    def decode(self, z: Tensor) -> Tensor:
        """Turn latents into pixels.

        z: (B, embed_dim, h, w), unit variance, as `encode` returns it.
        Returns (B, 3, H, W), nominally in [-1, 1], not clamped.
        """
        return self.decoder(self.post_quant_conv(z / self.config.scale))


class Codebook(nn.Module):
    """The vectors a VQ latent may take (van den Oord et al. 2017, arXiv:1711.00937, equations 1 and 2)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)

    def indices(self, z: Tensor) -> Tensor:
        """Index of the nearest codebook vector at each pixel. z: (B, D, h, w) -> (B, h, w) int64."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # (Bhw, D)
        codes = self.embedding.weight
        # |z - e|^2 without |z|^2, which is the same for every e.
        nearest = (codes.square().sum(1) - 2 * flat @ codes.T).argmin(dim=1)
        return nearest.view(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> Tensor:
        """Replace each pixel by its nearest codebook vector. z: (B, D, h, w) -> the same shape."""
        return self.embedding(self.indices(z)).permute(0, 3, 1, 2)


class VQModel(nn.Module):
    """Autoencoder with a codebook; the diffusion runs on the latent before quantisation.

    Rombach et al. 2022, section 3.1: the quantisation layer is absorbed by the decoder.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if config.codebook_size is None:
            raise ValueError("VQModel needs config.codebook_size; without a codebook use AutoencoderKL")
        self.config = config
        self.encoder = Encoder(config, config.z_channels)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Turn pixels into latents before quantisation. Shapes and ranges as in `AutoencoderKL.encode`."""
        return self.quant_conv(self.encoder(x)) * self.config.scale

    def decode(self, z: Tensor, *, quantize: bool = True) -> Tensor:
        """Snap to the codebook (unless `quantize` is False) and decode. Shapes: `AutoencoderKL.decode`."""
        z = z / self.config.scale
        return self.decoder(self.post_quant_conv(self.quantize(z) if quantize else z))
