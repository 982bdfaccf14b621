"""What LoRA files call the modules of a model, and which modules are trained.

Trainers name a module by the network it is in and its path there, with dots or underscores, in the names of
the original checkpoints or in those of diffusers, behind one of several prefixes. Written with underscores
and without prefix, all of them are one of two names for each module: `locate` looks those up.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from ldm.clip_layers import Layer
from ldm.models import Models
from ldm.rename import to_diffusers
from ldm.text.clip import ClipTextModel
from ldm.unet import Downsample, ResBlock, SpatialTransformer, Upsample


class Place(NamedTuple):
    """A module of a model."""

    part: str  # "unet"; "te", or "te1" and "te2": the text encoders, as kohya's trainer calls them
    name: str  # inside the part: "input_blocks.1.1.proj_in"


def parts(models: Models) -> dict[str, nn.Module]:
    """The networks that a LoRA can change, by the names of `Place.part`."""
    if len(models.text) == 1:
        return {"unet": models.unet, "te": models.text[0]}
    return {"unet": models.unet} | {f"te{i}": encoder for i, encoder in enumerate(models.text, 1)}


def kohya_key(models: Models, place: Place) -> str:
    """The name of a module in the files of kohya's trainer (sd-scripts), up to the dot before "lora_up".

    The UNet's modules have the names of diffusers, except for SDXL's, which keep those of the checkpoint.
    """
    name = place.name
    if place.part == "unet" and not models.family.name.startswith("sdxl"):
        name = to_diffusers(name, models.unet.config)
    return f"lora_{place.part}_{name.replace('.', '_')}"


def trained(models: Models, *, convolutions: bool = False) -> list[Place]:
    """The modules that kohya's trainer adapts: all linear layers and convolutions of some kinds of blocks.

    In the UNet those are the transformers and, with `convolutions` (LoCon), the ResBlocks and resamplers; in
    the text encoders all layers. Embeddings and the first and the last convolution are never adapted.
    """
    unet_blocks = (SpatialTransformer, *((ResBlock, Downsample, Upsample) if convolutions else ()))
    places = []
    for part, network in parts(models).items():
        for name, block in network.named_modules():
            if isinstance(block, unet_blocks if part == "unet" else Layer):
                places += [
                    Place(part, f"{name}.{inner}")
                    for inner, module in block.named_modules()
                    if isinstance(module, (nn.Linear, nn.Conv2d))
                ]
    never_run = [  # kohya's SD2 encoder ends before its last layer, whose result nothing uses
        f"text_model.encoder.layers.{encoder.config.layers - 1}."
        for encoder in models.text
        if isinstance(encoder, ClipTextModel) and models.family.name.startswith("sd2")
    ]
    return [place for place in places if not place.name.startswith(tuple(never_run))]


def names(models: Models) -> dict[str, Place]:
    """Every module that has a weight, by "part/name", the name in each vocabulary and with underscores."""
    found = {}
    for part, network in parts(models).items():
        for name, module in network.named_modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                for alias in _aliases(models, part, name):
                    found[f"{part}/{alias.replace('.', '_')}"] = Place(part, name)
    return found


def _aliases(models: Models, part: str, name: str) -> Iterator[str]:
    if part == "unet":
        yield name
        yield to_diffusers(name, models.unet.config)
    else:
        yield name.removeprefix("text_model.")  # a level that not all versions of transformers have


_PREFIX = re.compile(
    r"(?:base_model_model_)?"  # PEFT
    r"(?:lora_|lycoris_)?"
    r"(?:(?P<unet>unet|model_diffusion_model|diffusion_model)_"
    r"|(?P<second>te2|text_encoder_2|clip_g)_"
    r"|(?P<first>te1?|text_encoder(?:_1)?|clip_l)_)?"
    r"(?:base_model_model_)?"
    r"(?:(?:transformer_)?text_model_)?"
)
# diffusers' first LoRA files named what they put beside the attention, not the layer it stands for.
_PROCESSORS = (
    (re.compile(r"_processor_to_"), "_to_"),
    (re.compile(r"_to_out$"), "_to_out_0"),
    (re.compile(r"_self_attn_to_([qkv])$"), r"_self_attn_\1_proj"),
    (re.compile(r"_self_attn_to_out_0$"), "_self_attn_out_proj"),
)


def locate(key: str, known: Mapping[str, Place]) -> Place | None:
    """The module that a file calls `key`. known: `names(models)`. None: the model has no such module."""
    key = key.replace(".", "_")
    match = _PREFIX.match(key)
    assert match  # all of it is optional
    name = key[match.end() :]
    for pattern, replacement in _PROCESSORS:
        name = pattern.sub(replacement, name)
    if match["unet"]:
        candidates = ("unet",)
    elif match["second"]:
        candidates = ("te2",)
    elif match["first"]:
        candidates = ("te", "te1")
    else:
        candidates = ("unet", "te", "te1")
    return next((place for part in candidates if (place := known.get(f"{part}/{name}"))), None)
