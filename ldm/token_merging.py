"""Self-attention among fewer tokens (Bolya and Hoffman 2023, arXiv:2303.17604, "ToMe for Stable Diffusion").

Self-attention takes time in proportion to the square of its tokens, and many of them say the same: a wall, a
sky. So each time, before it, those most alike are made one, their mean; what it finds for the mean, all of
them get. The rest of the block (attention to the text, feed-forward) sees every token.

    with merging(models.unet, 0.5, size=(64, 64)):   # of the latent: half of the 4096 tokens are left
        ...

unet.py stays the textbook: within the block, some of its layers get another class, as in optimization.py.
Their weights, and the names of them, are untouched.

Shapes: B batch, C channels, h w the map, L = h * w tokens, M of them left.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.unet import BasicTransformerBlock, UNet


@contextmanager
def merging(unet: UNet, ratio: float, size: tuple[int, int], downsample: int = 1) -> Iterator[None]:
    """Within the block, the UNet merges tokens in self-attention; then all is as before.

    ratio: the share of tokens to merge, 0 (none) to 0.75 (more counts as that: all have merged that may).
    size: height and width of the latents that will come.
    downsample: where: on maps that are at most so many times smaller than the latent along one axis. At 1,
        the choice of the original and of the web UI, SDXL has no attention, and nothing is merged.
    """
    with ExitStack() as undo:
        for level, layers in _layers(unet) if ratio > 0 else ():
            if 2**level > downsample:
                continue
            shape = tuple(-(-side // 2**level) for side in size)  # halving rounds up
            for block in (m for m in layers.modules() if type(m) is BasicTransformerBlock):
                undo.callback(setattr, block, "__class__", BasicTransformerBlock)
                undo.callback(delattr, block, "merge")
                block.merge = ratio, shape  # type: ignore[assignment]
                block.__class__ = MergingBlock  # type: ignore[assignment]
        yield


def _layers(unet: UNet) -> Iterator[tuple[int, nn.Module]]:
    """The blocks of a UNet with their levels; 0 has the size of the latent."""
    each, lowest = unet.config.num_res_blocks + 1, len(unet.config.channel_mult) - 1
    for i, layers in enumerate(unet.input_blocks):
        yield max(i - 1, 0) // each, layers
    yield lowest, unet.middle_block
    for i, layers in enumerate(unet.output_blocks):
        yield lowest - i // each, layers


class MergingBlock(BasicTransformerBlock):
    """A transformer block whose self-attention sees merged tokens."""

    merge: tuple[float, tuple[int, int]]  # the share of tokens to merge, (h, w)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        places, left = matched(x, *self.merge)
        h = merged(self.norm1(x), places, left)
        x = x + unmerged(self.attn1(h, context if self.cross_only else h), places)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


def matched(x: Tensor, ratio: float, size: tuple[int, int]) -> tuple[Tensor, int]:
    """Which tokens of x (B, L, C) become one: the place of each among those left (B, L), and how many, M.

    The first token of every 2x2 square stays. Of the others, those merge that resemble one of these most, by
    the cosine; which it is, each finds for itself (section 3, "bipartite soft matching"). In the paper, the
    one that stays is drawn by lot for each square; the web UI takes the first, and so do we: no picture
    depends on what was drawn before. Where the choice is close, rounding decides it.
    """
    (height, width), length = size, x.shape[1]
    squares = (height // 2) * (width // 2)
    stay = torch.zeros(height, width, dtype=torch.long, device=x.device)
    stay[: height // 2 * 2 : 2, : width // 2 * 2 : 2] = 1
    fixed, free = stay.flatten().argsort(descending=True, stable=True).split([squares, length - squares])
    count = min(int(length * ratio), len(free)) if squares else 0
    left = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    if count == 0:
        return left.cumsum(1) - 1, length
    direction = F.normalize(x, dim=2)
    alike, nearest = (direction[:, free] @ direction[:, fixed].transpose(1, 2)).max(dim=2)
    chosen = alike.topk(count, dim=1).indices  # (B, count), numbers in `free`
    gone, targets = free[chosen], fixed[nearest.gather(1, chosen)]
    places = left.scatter(1, gone, 0).cumsum(1) - 1
    return places.scatter(1, gone, places.gather(1, targets)), length - count


def merged(x: Tensor, places: Tensor, left: int) -> Tensor:
    """The means of tokens that share a place. (B, L, C) -> (B, M, C)."""
    rows = (places + left * torch.arange(len(x), device=x.device)[:, None]).flatten()
    total = x.new_zeros(len(x) * left, x.shape[2]).index_add_(0, rows, x.flatten(0, 1))
    count = x.new_zeros(len(x) * left).index_add_(0, rows, torch.ones_like(rows, dtype=x.dtype))
    return (total / count[:, None]).unflatten(0, (-1, left))


def unmerged(x: Tensor, places: Tensor) -> Tensor:
    """Each token gets what is at its place. (B, M, C) -> (B, L, C)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
