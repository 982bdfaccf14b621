"""The first latent diffusion models, before Stable Diffusion.

Rombach et al. 2022, arXiv:2112.10752, section 4.
"""

from ldm.families.family import BertPart, ClassPart, Concat, Family
from ldm.schedules import NoiseSchedule


def _first_schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(0.0015, 0.0195)


TEXT2IMAGE_LARGE = Family(
    name="text2image-large",
    title="latent diffusion text2image-large",
    parts=(BertPart(prefix="cond_stage_model."),),
    in_channels=4,
    context_dims=(1280,),
    num_heads=8,
    size=256,
    steps=50,
    sampler="DDIM",
    cfg_scale=5.0,
)
CLASS_F4 = Family(
    name="class-f4",
    title="latent diffusion, ImageNet classes (f4)",
    parts=(ClassPart(prefix="cond_stage_model.embedding."),),
    in_channels=3,
    num_heads=1,
    schedule=_first_schedule,
    scale=1.0,
    size=256,
    steps=50,
    sampler="DDIM",
    cfg_scale=3.0,
)
CLASS_F8 = Family(
    name="class-f8",
    title="latent diffusion, ImageNet classes (f8)",
    parts=(ClassPart(prefix="cond_stage_model.embedding."),),
    in_channels=4,
    head_dim=32,
    schedule=_first_schedule,
    scale=1.0,
    size=256,
    steps=50,
    sampler="DDIM",
    cfg_scale=1.0,
)
UNCONDITIONAL = Family(
    name="unconditional",
    title="latent diffusion, unconditional",
    parts=(),
    in_channels=3,
    head_dim=32,
    schedule=_first_schedule,
    scale=1.0,
    size=256,
    steps=50,
    sampler="DDIM",
    cfg_scale=1.0,
)
LDSR = Family(
    name="ldsr",
    title="latent diffusion super-resolution (LDSR)",
    parts=(),
    in_channels=6,
    head_dim=32,
    schedule=lambda: NoiseSchedule.scaled_linear(0.0015, 0.0155),
    scale=1.0,
    size=256,
    steps=100,
    sampler="DDIM",
    cfg_scale=1.0,
    concat=Concat.LOW_RES,
)
