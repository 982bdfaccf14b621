"""The families of models, in the order in which a file is tried against them."""

from ldm.errors import CheckpointError
from ldm.families.family import (
    BertPart,
    ClassPart,
    ClipPart,
    Concat,
    Family,
    Picture,
    context_width,
    input_channels,
)
from ldm.families.infer import Shapes
from ldm.families.original import CLASS_F4, CLASS_F8, LDSR, TEXT2IMAGE_LARGE, UNCONDITIONAL
from ldm.families.sd1 import EMBEDDED, INSTRUCT_PIX2PIX, SD1, SD1_INPAINT
from ldm.families.sd2 import SD2, SD2_DEPTH, SD2_INPAINT, X4_UPSCALER
from ldm.families.sdxl import SDXL, SDXL_REFINER

__all__ = ["FAMILIES", "BertPart", "ClassPart", "ClipPart", "Concat", "Family", "Picture", "recognise"]

FAMILIES: tuple[Family, ...] = (
    EMBEDDED,  # before SD1: its layout is the same
    SD1,
    SD1_INPAINT,
    INSTRUCT_PIX2PIX,
    SD2,
    SD2_INPAINT,
    SD2_DEPTH,
    X4_UPSCALER,
    SDXL,
    SDXL_REFINER,
    TEXT2IMAGE_LARGE,
    CLASS_F4,
    CLASS_F8,
    UNCONDITIONAL,
    LDSR,
)

# What people pass for a checkpoint by mistake, by a piece of a name in it.
_MISTAKES = (
    (("lora_unet_", "lora_te", ".lora_A.", ".lora_down.", "lora.down", "hada_w1", "lokr_w"), "a LoRA"),
    (("control_model.", "controlnet_cond_embedding"), "a ControlNet"),
    (("string_to_param", "emb_params", "clip_g", "clip_l"), "a textual inversion embedding"),
    (("down_blocks.",), "a model in the layout of diffusers; use the original single file"),
    (("conv_first.", "RRDB_trunk", "body.0.rdb1"), "an upscaler"),
    (
        ("double_blocks.", "joint_blocks.", "transformer_blocks.0.img_mod"),
        "a transformer (Flux, SD3), no UNet",
    ),
    (("encoder.down.0.block.0.",), "an autoencoder; pass it as the VAE (vae=, --vae) of a checkpoint"),
)


def recognise(shapes: Shapes) -> Family:
    """The family of a file, from the names and shapes of its weights alone.

    Raises CheckpointError that says what the file seems to be instead.
    """
    for family in FAMILIES:
        if family.recognise(shapes):
            return family
    if (channels := input_channels(shapes)) is not None:
        raise CheckpointError(
            f"not a checkpoint of a known family: its UNet has {channels} input channels, "
            f"reads text of width {context_width(shapes)}, and its text encoder is missing or another"
        )
    for pieces, what in _MISTAKES:
        if any(piece in name for name in shapes for piece in pieces):
            raise CheckpointError(f"this is not a Stable Diffusion checkpoint but looks like {what}")
    first = ", ".join(sorted(shapes)[:3]) or "none"
    raise CheckpointError(f"not a checkpoint of a known family; its first weights: {first}")
