"""Stable Diffusion 2.x: OpenCLIP ViT-H, whose last layer is left out, and heads of width 64."""

from dataclasses import replace

from ldm.denoise import Prediction
from ldm.families.family import ClipPart, Concat, Family
from ldm.schedules import NoiseSchedule

SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    parts=(ClipPart(prefix="cond_stage_model.model.", openclip=True, pad_id=0, skip=2),),
    in_channels=4,
    context_dims=(1024,),
    head_dim=64,
    prediction=None,  # 2.x-base predicts eps and 2.x (768 px) v, with the same names and shapes
    size_v=768,
)
SD2_INPAINT = replace(
    SD2,
    name="sd2-inpaint",
    title="Stable Diffusion 2.x inpainting",
    in_channels=9,
    prediction=Prediction.EPS,
    concat=Concat.INPAINT,
)
SD2_DEPTH = replace(
    SD2,
    name="sd2-depth",
    title="Stable Diffusion 2.x depth",
    in_channels=5,
    prediction=Prediction.EPS,
    concat=Concat.DEPTH,
)
X4_UPSCALER = replace(
    SD2,
    name="x4-upscaler",
    title="Stable Diffusion x4 upscaler",
    in_channels=7,
    num_heads=8,
    head_dim=None,
    schedule=lambda: NoiseSchedule.scaled_linear(1e-4, 2e-2),
    prediction=Prediction.V,
    scale=0.08333,
    concat=Concat.LOW_RES,
)
