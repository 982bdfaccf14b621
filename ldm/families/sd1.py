"""Stable Diffusion 1.x: one CLIP-L text encoder, 8 heads. Rombach et al. 2022, arXiv:2112.10752."""

from dataclasses import replace

from torch import Tensor

from ldm.denoise import Prediction
from ldm.families.family import ClipPart, Concat, Family, Picture

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    parts=(ClipPart(prefix="cond_stage_model.transformer.", quick_gelu=True),),
    in_channels=4,
    context_dims=(768,),
    num_heads=8,
)
SD1_INPAINT = replace(
    SD1, name="sd1-inpaint", title="Stable Diffusion 1.x inpainting", in_channels=9, concat=Concat.INPAINT
)
# Brooks et al. 2022, arXiv:2211.09800.
INSTRUCT_PIX2PIX = replace(
    SD1, name="pix2pix", title="InstructPix2Pix", in_channels=8, concat=Concat.PICTURE, strength=1.0
)


def _pooled(pooled: Tensor, picture: Picture) -> Tensor:
    return pooled


# The model inside this package: the layout of Stable Diffusion 1, much narrower, with the vector of the whole
# text as a second input, as in SDXL (docs/embedded-model.md).
EMBEDDED = replace(
    SD1,
    name="embedded",
    title="ldm's embedded icon model",
    parts=(replace(SD1.parts[0], pooled=True),),
    vector=_pooled,
    weigh_pooled=True,
    context_dims=(128,),
    only_context_dims=True,
    num_heads=4,
    prediction=Prediction.V,
    size=64,
    cfg_scale=4.0,
)
