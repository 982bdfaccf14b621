"""Stable Diffusion XL: two text encoders, and the sizes of the picture as a vector.

Podell et al. 2023, arXiv:2307.01952, section 2.
"""

import torch
from torch import Tensor

from ldm.families.family import ClipPart, Family, Picture, size_embedding


def base_vector(pooled: Tensor, picture: Picture) -> Tensor:
    """(B, P) -> (B, P + 6 * 256): original size, crop corner, target size, each as (height, width)."""
    h, w = picture.height, picture.width
    (left, top), (original_w, original_h) = picture.corner, picture.original or (w, h)
    return torch.cat([pooled, size_embedding([original_h, original_w, top, left, h, w], pooled)], dim=1)


def refiner_vector(pooled: Tensor, picture: Picture) -> Tensor:
    """(B, P) -> (B, P + 5 * 256): original size, crop corner, aesthetic score."""
    # 6.0 and 2.5 are the original inference code's scores for the two halves of guidance.
    score = 2.5 if picture.negative else 6.0
    return torch.cat([pooled, size_embedding([picture.height, picture.width, 0, 0, score], pooled)], dim=1)


BIGG = "conditioner.embedders.{}.model."
TABLES = {"align_your_steps": "align_your_steps_sdxl", "gits": "gits_sdxl"}

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    parts=(
        ClipPart(prefix="conditioner.embedders.0.transformer.", quick_gelu=True, skip=2, final_norm=False),
        ClipPart(prefix=BIGG.format(1), openclip=True, pad_id=0, skip=2, final_norm=False, pooled=True),
    ),
    in_channels=4,
    context_dims=(2048,),
    head_dim=64,
    scale=0.13025,
    size=1024,
    spacings=TABLES,
    vector=base_vector,
    zero_empty_negative=True,
)
SDXL_REFINER = Family(
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    parts=(ClipPart(prefix=BIGG.format(0), openclip=True, pad_id=0, skip=2, final_norm=False, pooled=True),),
    in_channels=4,
    context_dims=(1280,),
    head_dim=64,
    scale=0.13025,
    size=1024,
    spacings=TABLES,
    vector=refiner_vector,
)
