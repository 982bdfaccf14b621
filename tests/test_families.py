"""Which family a file is of, from all of it or a part: names and shapes decide, as in the published files.

That the modules built for each published file have exactly its names and shapes is proven in test_names.py.
"""

import re
from pathlib import Path

import pytest
import torch

from ldm.building import DROPPED
from ldm.checkpoint import load
from ldm.denoise import Prediction
from ldm.errors import CheckpointError
from ldm.families import FAMILIES, ClipPart, recognise
from ldm.families.family import UNET, VAE
from ldm.families.infer import Shapes
from ldm.formats import write_safetensors
from ldm.schedules import NoiseSchedule
from tests.test_names import FAMILY_OF, below, manifest
from tests.tiny_families import BY_NAME, tiny


def only_unet(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(UNET)}


CLASSES = ("ldm-cin256-v2", "ldm-cin256-vqf8")


@pytest.mark.parametrize("name", [name for name in FAMILY_OF if name not in CLASSES])
def test_the_unet_alone_tells_the_family(name: str):
    assert recognise(only_unet(manifest(name))).name == FAMILY_OF[name]


@pytest.mark.parametrize("name", CLASSES)
def test_where_the_unet_alone_does_not_tell_the_family_it_is_not_guessed(name: str):
    with pytest.raises(CheckpointError, match="not a checkpoint of a known family"):
        recognise(only_unet(manifest(name)))


@pytest.mark.parametrize("name", FAMILY_OF)
def test_exactly_one_family_claims_a_file(name: str):
    shapes = manifest(name)
    assert [family.name for family in FAMILIES if family.recognise(shapes)] == [FAMILY_OF[name]]


@pytest.mark.parametrize("name", FAMILY_OF)
def test_what_a_loader_leaves_out_is_on_the_list(name: str):
    shapes = manifest(name)
    family = recognise(shapes)
    parts = (UNET, VAE, *(part.prefix for part in family.parts))
    dropped = re.compile("|".join(pattern for pattern, _ in DROPPED))
    assert [key for key in shapes if not key.startswith(parts) and not dropped.fullmatch(key)] == []
    # And nothing that the UNet or the autoencoder needs.
    needed = [key for key in shapes if key.startswith((UNET, VAE))]
    assert [key for key in needed if dropped.fullmatch(key)] == []


@pytest.mark.parametrize("name", BY_NAME)
def test_small_models_are_recognised_too(name: str):
    shapes = {key: tuple(w.shape) for key, w in tiny(name).state_dict().items()}
    assert recognise(shapes).name == name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_states_what_shapes_cannot(family):
    assert (family.num_heads is None) != (family.head_dim is None)
    assert isinstance(family.schedule(), NoiseSchedule)
    assert family.scale > 0
    prefixes = [part.prefix for part in family.parts]
    assert len(set(prefixes)) == len(prefixes)
    # A pooled vector is made of the sizes of pictures, and the other way round.
    pooled = any(isinstance(part, ClipPart) and part.pooled for part in family.parts)
    assert pooled == (family.vector is not None)


def test_names_of_families_are_unique():
    assert len(BY_NAME) == len(FAMILIES)


def test_constants_are_the_published_ones():
    """configs/ of CompVis/latent-diffusion, CompVis/stable-diffusion, Stability-AI's two repositories."""
    sigma_max = {name: family.schedule().sigma_max for name, family in BY_NAME.items()}
    stable = NoiseSchedule.scaled_linear(0.00085, 0.012).sigma_max
    first = NoiseSchedule.scaled_linear(0.0015, 0.0195).sigma_max
    assert {name for name, value in sigma_max.items() if value == stable} == {
        "embedded", "sd1", "sd1-inpaint", "pix2pix", "sd2", "sd2-inpaint", "sd2-depth", "sdxl",
        "sdxl-refiner", "text2image-large",
    }  # fmt: skip
    assert {name for name, value in sigma_max.items() if value == first} == {
        "class-f4",
        "class-f8",
        "unconditional",
    }
    assert sigma_max["ldsr"] == NoiseSchedule.scaled_linear(0.0015, 0.0155).sigma_max
    assert sigma_max["x4-upscaler"] == NoiseSchedule.scaled_linear(1e-4, 2e-2).sigma_max
    scales = {name: family.scale for name, family in BY_NAME.items()}
    assert scales["sd1"] == scales["sd2"] == scales["text2image-large"] == 0.18215
    assert scales["sdxl"] == scales["sdxl-refiner"] == 0.13025
    assert scales["x4-upscaler"] == 0.08333
    assert scales["class-f4"] == scales["unconditional"] == scales["ldsr"] == 1.0
    predictions = {name: family.prediction for name, family in BY_NAME.items()}
    assert predictions["sd2"] is None
    assert {name for name, value in predictions.items() if value is Prediction.V} == {
        "embedded",
        "x4-upscaler",
    }


def test_a_checkpoint_without_a_known_text_encoder_is_not_taken_for_the_nearest_family():
    shapes = manifest("sd15")
    other = {
        key.replace("cond_stage_model.transformer", "cond_stage_model.other"): s for key, s in shapes.items()
    }
    with pytest.raises(CheckpointError, match="4 input channels, reads text of width 768, and its text enc"):
        recognise(other)


def test_a_unet_that_takes_a_vector_in_a_family_without_one_is_refused(tmp_path: Path):
    weights = tiny("sd1").state_dict()
    emb = 4 * tiny("sd1").unet.config.model_channels
    weights |= {
        f"{UNET}label_emb.0.{layer}.{kind}": torch.zeros(shape)
        for layer, kind, shape in (
            (0, "weight", (emb, 8)),
            (0, "bias", (emb,)),
            (2, "weight", (emb, emb)),
            (2, "bias", (emb,)),
        )
    }
    write_safetensors(tmp_path / "a.safetensors", weights)
    with pytest.raises(CheckpointError, match="not a checkpoint of a known family"):
        load(tmp_path / "a.safetensors")


def test_all_manifests_have_a_unet_and_an_autoencoder():
    for name in FAMILY_OF:
        shapes = manifest(name)
        assert below(shapes, UNET)
        assert below(shapes, VAE)
