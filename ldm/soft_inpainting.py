"""Soft inpainting: a grey mask says how much of the picture stays, and the result is shown where it changed.

Plain inpainting knows two kinds of pixels. Here a mask of 0 to 1 says how firmly each is held: `blended`
pulls every step's latent back to the picture, strongly while there is much noise and ever less, and `visible`
looks at what truly changed to decide which pixels of the result are shown. Made for masks with a wide blur.

The method and its numbers are those of the web UI's extension "soft inpainting" (CodeHatchling, 2023).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import check_range


@dataclass(frozen=True, kw_only=True)
class Soft:
    """Settings of soft inpainting. Raises RequestError for values out of range."""

    schedule_bias: float = 1.0  # above 1: the picture is held early, at much noise; below 1: late
    preservation: float = 0.5  # how firmly half-masked pixels are held; 0: not at all
    contrast_boost: float = 4.0  # 1: mixing latents may wash out detail; higher: the stronger of the two wins
    mask_influence: float = 0.0  # 0: only change decides what is shown; 1: also the mask
    difference_threshold: float = 0.5  # change of a latent at which half of the result is shown
    difference_contrast: float = 2.0  # how suddenly

    def __post_init__(self) -> None:
        check_range("the schedule bias of soft inpainting", self.schedule_bias, 0, 8)
        check_range("the preservation strength of soft inpainting", self.preservation, 0, 8)
        check_range("the transition contrast boost of soft inpainting", self.contrast_boost, 1, 32)
        check_range("the mask influence of soft inpainting", self.mask_influence, 0, 1)
        check_range("the difference threshold of soft inpainting", self.difference_threshold, 0, 8)
        check_range("the difference contrast of soft inpainting", self.difference_contrast, 0, 8)


def mask_at(soft: Soft, mask: Tensor, sigma: float) -> Tensor:
    """The mask of one step: the more noise, the further it withdraws from half-masked pixels.

    mask: (1, 1, h, w) in [0, 1], 1 where the picture is repainted. Raising it to a power p is like blending
    p times over; p follows sigma, so that the pull towards the picture and the step of the sampler stay in
    balance. Pixels of 0 stay 0 and those of 1 stay 1.
    """
    return torch.where(mask > 0, mask ** (sigma**soft.schedule_bias * soft.preservation), 0.0)


def blended(soft: Soft, original: Tensor, denoised: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """Pull a step's `denoised` towards the latent of the picture, both (B, C, h, w).

    The mean of two unlike vectors is shorter than either, which shows as a loss of contrast: the length of
    each pixel's vector of channels is therefore mixed by itself, as a power mean of order `contrast_boost`.
    """
    share = mask_at(soft, mask, sigma)
    mixed = torch.lerp(original, denoised, share)

    def length(x: Tensor) -> Tensor:
        return x.double().norm(dim=1, keepdim=True)  # (B, 1, h, w); float64 holds 32nd powers

    order = soft.contrast_boost
    wanted = (length(original) ** order * (1 - share) + length(denoised) ** order * share) ** (1 / order)
    stretched = mixed * (wanted / (length(mixed) + 1e-5)).to(mixed.dtype)
    return torch.where(share > 0, stretched, original)  # what is not masked stays to the bit


def visible(soft: Soft, original: Tensor, finished: Tensor, mask: Tensor) -> Tensor:
    """How much of the result to show, (B, 1, h, w) in [0, 1], from how far its latents (B, C, h, w) moved.

    mask: as above. Where nothing moved, the original pixels are as good and sharper. The map is then enlarged
    to the size of the picture and blurred a little, see `ldm.masks.shown`.
    """
    distance = (finished - original).float().norm(dim=1, keepdim=True)  # (B, 1, h, w)
    distance = _window_mean(distance, 0.9, 1.0)  # spread a little, as the decoder does
    distance = _window_mean(distance, 0.25, 0.75)  # without lonely pixels
    held = 1 - mask.clamp(0, 1) ** (soft.preservation / 2)
    held = torch.lerp(torch.full_like(held, 0.5), held, soft.mask_influence)
    half = soft.difference_threshold * held / (1.00001 - held)  # the distance at which half is shown
    kept = 1 / (1 + (distance / half.clamp(min=1e-6)) ** soft.difference_contrast)
    return 1 - kept**3 * (kept * (6 * kept - 15) + 10)  # a step with smooth ends (Perlin 2002)


_RADIUS, _WIDTH = 2, 1.5  # of the weights around a pixel, in latent pixels


def _window_mean(x: Tensor, low: float, high: float) -> Tensor:
    """The mean of the values around each pixel that lie between two quantiles; x: (B, 1, h, w).

    0.25 to 0.75 is a median that keeps some smoothness, 0.9 to 1 a softened maximum. Each of the 5 x 5 values
    counts with a bell-shaped weight, and at least a total weight of 1 (that of the centre) is averaged.
    """
    b, _, h, w = x.shape
    r = torch.arange(-_RADIUS, _RADIUS + 1.0)
    bell = torch.exp(-(r[:, None] ** 2 + r**2) / _WIDTH**2)
    end = math.exp(-((_RADIUS + 1) ** 2) / _WIDTH**2)  # lowered, so as to reach 0 one pixel further out
    bell = ((bell - end) / (1 - end)).clamp(min=0).to(x.device)

    def neighbours(image: Tensor) -> Tensor:
        return F.unfold(image, 2 * _RADIUS + 1, padding=_RADIUS)  # (B, 25, h * w); 0 beyond the edge

    weights = neighbours(torch.ones_like(x)) * bell.reshape(1, -1, 1)
    values, order = neighbours(x).sort(dim=1)
    weights = weights.gather(1, order)
    above = weights.cumsum(1)  # each value occupies a stretch of the total weight, from `above - weights`
    total = above[:, -1:]
    width = (total * (high - low)).clamp(min=1.0)
    start = (total * (low + high) / 2 - width / 2).clamp(min=0.0)
    start = torch.minimum(start, total - width)
    shares = (torch.minimum(above, start + width) - torch.maximum(above - weights, start)).clamp(min=0)
    mean = (values * shares).sum(1) / shares.sum(1)
    return mean.reshape(b, 1, h, w)
