"""Every published checkpoint has exactly the names and shapes of the modules that we build for it."""

import gzip
import json
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ldm.building import DROPPED
from ldm.families import BertPart, ClassPart, ClipPart, Family, recognise
from ldm.families.family import UNET, VAE, Part
from ldm.families.infer import Shapes, bert_config, clip_config, unet_config, vae_config
from ldm.text.bert import BertConfig, BertTextModel
from ldm.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipTextModel
from ldm.text.openclip_names import to_hf, to_openclip
from ldm.unet import (
    SD1_UNET,
    SD2_UNET,
    SDXL_REFINER_UNET,
    SDXL_UNET,
    X4_UPSCALER_UNET,
    UNet,
)
from ldm.vae import KL_F8, AutoencoderKL, VQModel
from tests.golden import golden

FAMILY_OF = {
    "sd15": "sd1",
    "sd15-with-ema": "sd1",
    "sd15-inpainting": "sd1-inpaint",
    "instruct-pix2pix": "pix2pix",
    "sd21-512-base": "sd2",
    "sd21-768-v": "sd2",
    "sd2-inpainting": "sd2-inpaint",
    "sd2-depth": "sd2-depth",
    "sd-x4-upscaler": "x4-upscaler",
    "sdxl-base": "sdxl",
    "sdxl-refiner": "sdxl-refiner",
    "ldm-txt2img-large": "text2image-large",
    "ldm-cin256-v2": "class-f4",
    "ldm-cin256-vqf8": "class-f8",
    "ldm-celeba256": "unconditional",
    "ldsr-bsr_sr": "ldsr",
}
AUTOENCODERS = [
    *(f"autoencoder-kl-{kind}" for kind in ("f4", "f8", "f16", "f32")),
    *(f"autoencoder-vq-{kind}" for kind in ("f4", "f4-noattn", "f8", "f8-n256", "f16")),
]


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a published file."""
    with gzip.open(golden(f"manifests/{name}.json.gz")) as file:
        return {key: tuple(entry["shape"]) for key, entry in json.load(file)["tensors"].items()}


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def named(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {prefix + key: shape for key, shape in shapes.items()}


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


def without_memory(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def autoencoder(shapes: Shapes) -> AutoencoderKL | VQModel:
    config = vae_config(shapes, scale=KL_F8.scale)
    return AutoencoderKL(config) if config.codebook_size is None else VQModel(config)


def text_part(part: Part, shapes: Shapes) -> nn.Module:
    match part:
        case ClipPart():
            hf = shapes_of(to_hf(without_memory(shapes))) if part.openclip else shapes
            return ClipTextModel(clip_config(hf, quick_gelu=part.quick_gelu))
        case BertPart():
            return BertTextModel(bert_config(shapes))
        case ClassPart():
            count, width = shapes["weight"]
            return nn.Embedding(count, width)


def modules(family: Family, shapes: Shapes) -> Iterator[tuple[str, nn.Module]]:
    """(prefix, module) of all parts, inferred from the shapes alone and built without memory."""
    with torch.device("meta"):
        config = unet_config(below(shapes, UNET), num_heads=family.num_heads, head_dim=family.head_dim)
        yield UNET, UNet(config)
        yield VAE, autoencoder(below(shapes, VAE))
        for part in family.parts:
            yield part.prefix, text_part(part, below(shapes, part.prefix))


@pytest.mark.parametrize("name", FAMILY_OF)
def test_names_and_shapes_are_those_of_the_checkpoint(name: str):
    shapes = manifest(name)
    family = recognise(shapes)
    assert family.name == FAMILY_OF[name]
    openclip = {part.prefix for part in family.parts if isinstance(part, ClipPart) and part.openclip}
    ours: dict[str, tuple[int, ...]] = {}
    for prefix, module in modules(family, shapes):
        assert not list(module.buffers())  # a buffer would stay on meta, or be in no file
        weights = module.state_dict()
        ours |= named(prefix, shapes_of(to_openclip(weights) if prefix in openclip else weights))
    dropped = re.compile("|".join(pattern for pattern, _ in DROPPED))
    assert ours == {key: shape for key, shape in shapes.items() if not dropped.fullmatch(key)}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_names_and_shapes_are_those_of_the_autoencoder(name: str):
    shapes = manifest(name)
    with torch.device("meta"):
        vae = autoencoder(shapes)
    assert isinstance(vae, VQModel) == ("-vq-" in name)
    assert vae.config.factor == int(name.split("-f")[1].split("-")[0])
    assert shapes_of(vae.state_dict()) == shapes
    assert not list(vae.buffers())


def test_every_reason_to_drop_a_weight_is_needed_or_from_training():
    names = [key for name in FAMILY_OF for key in manifest(name)]
    unused = [pattern for pattern, _ in DROPPED if not any(re.fullmatch(pattern, key) for key in names)]
    # The manifests leave out the losses of training and the markers of the community.
    assert len(unused) == 2


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sd15", SD1_UNET),
        ("sd21-768-v", SD2_UNET),
        ("sdxl-base", SDXL_UNET),
        ("sdxl-refiner", SDXL_REFINER_UNET),
        ("sd-x4-upscaler", X4_UPSCALER_UNET),
    ],
)
def test_inferred_unet_is_the_published_configuration(name: str, config: object):
    shapes = manifest(name)
    family = recognise(shapes)
    own = below(shapes, UNET)
    assert unet_config(own, num_heads=family.num_heads, head_dim=family.head_dim) == config


def test_inferred_autoencoder_is_the_published_configuration():
    assert vae_config(manifest("autoencoder-kl-f8"), scale=KL_F8.scale) == KL_F8


@pytest.mark.parametrize(
    ("name", "configs"),
    [
        ("sd15", [CLIP_L]),
        ("sd21-768-v", [OPENCLIP_H]),
        ("sdxl-base", [CLIP_L, OPENCLIP_BIGG]),
        ("sdxl-refiner", [OPENCLIP_BIGG]),
        ("ldm-txt2img-large", [BertConfig()]),
    ],
)
def test_inferred_text_encoders_are_the_published_configurations(name: str, configs: list[object]):
    shapes = manifest(name)
    with torch.device("meta"):
        encoders = [text_part(part, below(shapes, part.prefix)) for part in recognise(shapes).parts]
    assert [encoder.config for encoder in encoders] == configs
