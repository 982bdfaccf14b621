"""The network that predicts the noise: one UNet for the whole Stable Diffusion family.

A ladder of ResBlocks (Dhariwal and Nichol 2021, arXiv:2105.05233) with attention on the lower rungs: the
original latent diffusion models use plain self-attention, text models a transformer that also looks at the
context (Rombach et al. 2022, arXiv:2112.10752, section 3.3), SDXL several of them in a row and a vector of
picture sizes (Podell et al. 2023, arXiv:2307.01952, section 2). Parameter names are those of the original
checkpoints.

Shapes: B batch, C channels, h w latent pixels, L = h * w of the level, N context tokens, D context width,
E = 4 * model_channels width of the time embedding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a UNet; the defaults are Stable Diffusion 1.x."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, in units of `model_channels`
    num_res_blocks: int = 2
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks per level; 0: no attention there
    middle_depth: int = 1
    context_dim: int | None = 768  # width of the text features; None: plain self-attention, no context
    num_heads: int | None = 8  # a fixed number of heads ...
    head_dim: int | None = None  # ... or a fixed width of each (then num_heads is None)
    linear_projection: bool = False  # into the transformers; SD2 and SDXL: a linear layer, SD1: a 1x1 conv
    cross_only: tuple[bool, ...] = ()  # levels whose first attention looks at the context too (x4-upscaler)
    new_attention_order: bool = False  # plain attention only: q, k, v first and heads second, or the reverse
    vector_dim: int | None = None  # width of SDXL's pooled text and sizes
    num_classes: int | None = None  # size of a class table (x4-upscaler: noise levels)
    scale_shift_norm: bool = False
    resblock_updown: bool = False

    def heads(self, channels: int) -> int:
        """Attention heads at a level of that width."""
        return self.num_heads if self.num_heads is not None else channels // (self.head_dim or channels)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def factor(self) -> int:
        """How much smaller than the latent the lowest level is, along one axis."""
        return 2 ** (len(self.channel_mult) - 1)


SD1_UNET = UNetConfig()
SD2_UNET = replace(SD1_UNET, context_dim=1024, num_heads=None, head_dim=64, linear_projection=True)
SDXL_UNET = replace(
    SD2_UNET, channel_mult=(1, 2, 4), depth=(0, 2, 10), middle_depth=10, context_dim=2048, vector_dim=2816
)
SDXL_REFINER_UNET = replace(
    SD2_UNET, model_channels=384, depth=(0, 4, 4, 0), middle_depth=4, context_dim=1280, vector_dim=2560
)
X4_UPSCALER_UNET = replace(
    SD2_UNET,
    in_channels=7,
    model_channels=256,
    channel_mult=(1, 2, 2, 4),
    depth=(0, 1, 1, 1),
    num_heads=8,
    head_dim=None,
    cross_only=(False, True, True, False),
    num_classes=1000,
)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of a number. t: (B,), may be fractional -> (B, dim) float32.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, but all cosines first, then all sines; an odd `dim`
    ends in a zero.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device)
    )
    angles = t[:, None].float() * frequencies  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class InputConv(nn.Conv2d):
    """The first convolution, with the signature that all layers of a block share: (h, emb, context, size)."""

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None, size: Sequence[int]) -> Tensor:  # type: ignore[override]
        return super().forward(h)


class Downsample(nn.Module):
    """Strided convolution: halves height and width (rounding up)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None, size: Sequence[int]) -> Tensor:
        return self.op(h)


class Upsample(nn.Module):
    """Nearest neighbour to `size`, then a convolution.

    `size` is that of the skip connection which comes next: twice the input, or one less for an odd latent.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(h, size=tuple(size), mode="nearest"))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding between them. (B, C_in, h, w) -> (B, C_out, h, w).

    scale_shift: the embedding scales and shifts the normalised features (Dhariwal and Nichol 2021, section 3,
    "AdaGN") instead of being added. resample: -1 halves, +1 doubles the resolution inside the block (BigGAN).
    """

    def __init__(
        self, in_channels: int, emb_dim: int, out_channels: int, scale_shift: bool = False, resample: int = 0
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_dim, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original: it keeps the convolution at index 3
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        if in_channels != out_channels:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.skip_connection = nn.Identity()

    def _resize(self, h: Tensor, size: Sequence[int]) -> Tensor:
        if self.resample < 0:
            return F.avg_pool2d(h, 2)
        if self.resample > 0:
            return F.interpolate(h, size=tuple(size), mode="nearest")
        return h

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, size: Sequence[int]) -> Tensor:
        h = self._resize(self.in_layers[:2](x), size)
        h = self.in_layers[2](h)
        e = self.emb_layers(emb)[:, :, None, None]  # (B, C_out or 2 C_out, 1, 1)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self._resize(x, size)) + h


class AttentionBlock(nn.Module):
    """Plain self-attention over all pixels, in the models without text (Ho et al. 2020, arXiv:2006.11239)."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, size: Sequence[int]) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3C, L)
        # The channels are laid out [q k v][heads] in the new order, [heads][q k v] in the old one. q, k and v
        # become (B, heads, L, C/heads), copied, as torch would build the (L, L) matrix for other strides.
        if self.new_order:
            q, k, v = qkv.unflatten(1, (3, self.heads, -1)).transpose(3, 4).contiguous().unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).transpose(3, 4).contiguous().unbind(2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)  # (B, C, L)
        return x + self.proj_out(h).unflatten(2, x.shape[2:])


class CrossAttention(nn.Module):
    """Multi-head attention of pixels to a context. (B, L, C), (B, N, D) -> (B, L, C).

    Vaswani et al. 2017, equation 1.
    """

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # the original adds dropout at index 1

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L or N, C/heads)
            for layer, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear layer with a GELU gate (Shazeer 2020, arXiv:2002.05202). (B, L, C_in) -> (B, L, C_out)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The transformer's two-layer network, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Index 1 is dropout in the original.
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a layer norm and around a shortcut."""

    def __init__(self, channels: int, context_dim: int, heads: int, cross_only: bool) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(channels, context_dim if cross_only else channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.cross_only else h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of a feature map, conditioned on the context. (B, C, h, w) -> the same."""

    def __init__(
        self, channels: int, context_dim: int, heads: int, depth: int, linear: bool, cross_only: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)  # 1e-6 here, 1e-5 in ResBlocks: as trained
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads, cross_only) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: Sequence[int]) -> Tensor:
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))  # (B, L, C)
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])
        else:
            h = self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))
        return x + h


class Block(nn.ModuleList):
    """Layers in a row, all called alike."""

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None, size: Sequence[int]) -> Tensor:
        for layer in self:
            h = layer(h, emb, context, size)
        return h


def _res(config: UNetConfig, in_channels: int, out_channels: int, resample: int = 0) -> ResBlock:
    return ResBlock(in_channels, 4 * config.model_channels, out_channels, config.scale_shift_norm, resample)


def _attention(config: UNetConfig, channels: int, depth: int, cross_only: bool = False) -> nn.Module:
    heads = config.heads(channels)
    if config.context_dim is None:
        return AttentionBlock(channels, heads, config.new_attention_order)
    return SpatialTransformer(
        channels, config.context_dim, heads, depth, config.linear_projection, cross_only
    )


def _block(config: UNetConfig, in_channels: int, level: int) -> Block:
    """A ResBlock that brings the features to the level's width, and the level's attention, if it has any."""
    width, depth = config.widths[level], config.depth[level]
    layers: list[nn.Module] = [_res(config, in_channels, width)]
    if depth > 0:
        cross_only = bool(config.cross_only) and config.cross_only[level]
        layers.append(_attention(config, width, depth, cross_only))
    return Block(layers)


class InputHalf(nn.Module):
    """The way down and the turn: what a UNet and a ControlNet have in common."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        emb_dim = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        if config.vector_dim is not None:
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(config.vector_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
            )
        elif config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb_dim)

        channels = config.model_channels
        self.input_blocks = nn.ModuleList([Block([InputConv(config.in_channels, channels, 3, padding=1)])])
        self.skips = [channels]  # widths of the outputs of input_blocks
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(_block(config, channels, level))
                channels = width
                self.skips.append(channels)
            if level < len(config.widths) - 1:
                down = (
                    _res(config, channels, channels, -1) if config.resblock_updown else Downsample(channels)
                )
                self.input_blocks.append(Block([down]))
                self.skips.append(channels)

        self.middle_block = Block(
            [
                _res(config, channels, channels),
                _attention(config, channels, config.middle_depth),
                _res(config, channels, channels),
            ]
        )

    def embedding(self, x: Tensor, t: Tensor, context: Tensor | None, y: Tensor | None) -> Tensor:
        """What all blocks are told: the timestep, and the vector or class y. (B, E) in the dtype of x.

        Raises ValueError if context or y is missing or given in vain.
        """
        if (context is None) != (self.config.context_dim is None):
            raise ValueError(f"this network {'needs' if context is None else 'takes no'} context")
        if (y is None) != (self.config.vector_dim is None and self.config.num_classes is None):
            raise ValueError(
                f"this network {'needs' if y is None else 'takes no'} vector conditioning or class y"
            )
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        return emb if y is None else emb + self.label_emb(y)

    def down(
        self, x: Tensor, emb: Tensor, context: Tensor | None, added: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """The outputs of all input blocks, and the middle block's last.

        added: number of an input block -> features (B or 1, C, h, w) to add to its output.
        """
        h, outputs = x, []
        for i, layers in enumerate(self.input_blocks):
            h = layers(h, emb, context, h.shape[2:])
            h = h + added[i] if i in added else h
            outputs.append(h)
        return [*outputs, self.middle_block(h, emb, context, h.shape[2:])]


class UNet(InputHalf):
    """Predicts eps or v from a noisy latent, its noise level and the conditioning."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels = config.widths[-1]
        skips = self.skips.copy()  # output_blocks take them in reverse
        self.output_blocks = nn.ModuleList()
        for level in range(len(config.widths) - 1, -1, -1):
            for i in range(config.num_res_blocks + 1):
                layers = _block(config, channels + skips.pop(), level)
                channels = config.widths[level]
                if level > 0 and i == config.num_res_blocks:
                    layers.append(
                        _res(config, channels, channels, 1) if config.resblock_updown else Upsample(channels)
                    )
                self.output_blocks.append(layers)

        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, config.out_channels, 3, padding=1)
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        adapter: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Predict eps or v.

        x: (B, in_channels, h, w), scaled to unit variance (the variance-preserving view).
        t: (B,) timestep, 0 .. 999, may be fractional.
        context: (B, N, context_dim) text features; None only for a UNet without context.
        y: (B, vector_dim) vector conditioning, or (B,) int64 classes, for a UNet that has them.
        control: residuals of a ControlNet, one for each input block, then one for the middle block.
        adapter: features of a T2I-Adapter, see `down`.
        Returns (B, out_channels, h, w) in the dtype of x.
        Raises ValueError if context or y is missing or given in vain.
        """
        emb = self.embedding(x, t, context, y)
        outputs = self.down(x, emb, context, adapter or {})
        if control is not None:
            outputs = [output + residual for output, residual in zip(outputs, control, strict=True)]
        *skips, h = outputs
        for layers in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = layers(h, emb, context, (skips[-1] if skips else h).shape[2:])
        return self.out(h)
