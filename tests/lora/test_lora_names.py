"""Every name that trainers write is found in the model, and ours are kohya's."""

import gzip
import json
import os
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from ldm.denoise import Denoiser, Prediction
from ldm.lora_names import Place, kohya_key, locate, names, parts, trained
from ldm.models import Models
from ldm.rename import to_diffusers
from ldm.schedules import NoiseSchedule
from ldm.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipTextModel
from ldm.unet import SD1_UNET, SD2_UNET, SDXL_UNET, UNet
from tests.golden import GOLDEN
from tests.tiny_families import BY_NAME, tiny

CONFIGS = {
    "sd1": (SD1_UNET, (CLIP_L,)),
    "sd2": (SD2_UNET, (OPENCLIP_H,)),
    "sdxl": (SDXL_UNET, (CLIP_L, OPENCLIP_BIGG)),
}
KOHYA = {
    "kohya-sd15": "sd1",
    "kohya-sd15-with-conv3x3": "sd1",
    "kohya-sd2": "sd2",
    "kohya-sdxl": "sdxl",
    "kohya-sdxl-with-conv3x3": "sdxl",
}
DIFFUSERS = {
    "diffusers-sd15-all": "sd1",
    "diffusers-sd15-attn": "sd1",
    "diffusers-sdxl-all": "sdxl",
    "diffusers-sdxl-attn": "sdxl",
    "diffusers-text-encoder": "sd1",
}


@cache
def published(family: str) -> Models:
    """A model of the published size, without memory for its weights."""
    unet, encoders = CONFIGS[family]
    with torch.device("meta"):
        text = tuple(ClipTextModel(config) for config in encoders)
        denoiser = Denoiser(UNet(unet), NoiseSchedule.scaled_linear(), Prediction.EPS)
    return Models(BY_NAME[family], denoiser, None, text)


@cache
def known(family: str) -> dict[str, Place]:
    return names(published(family))


def manifest(name: str) -> dict:
    """Of a LoRA. Those whose names are all in another one's are only in the complete data."""
    for folder in (GOLDEN, Path(os.environ.get("LDM_GOLDEN", GOLDEN))):
        path = folder / f"manifests/{name}.json.gz"
        if path.exists():
            return json.loads(gzip.decompress(path.read_bytes()))
    pytest.skip("only in the complete golden data; set LDM_GOLDEN to its folder")


@pytest.mark.parametrize("name", KOHYA)
def test_we_adapt_the_modules_that_kohya_adapts_under_the_same_names(name: str):
    models = published(KOHYA[name])
    keys = {key.split(".")[0] for key in manifest(f"lora-{name}")["tensors"]}
    places = trained(models, convolutions="conv3x3" in name)
    assert {kohya_key(models, place) for place in places} == keys
    assert {locate(kohya_key(models, place), known(KOHYA[name])) for place in places} == set(places)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_names_of_diffusers_and_peft_are_found(name: str):
    layouts = [value for value in manifest(f"lora-{name}").values() if isinstance(value, dict)]
    assert len(layouts) == 2
    for layout in layouts:
        keys = {re.sub(r"\.lora.*", "", key) for key in layout}
        assert len({locate(key, known(DIFFUSERS[name])) for key in keys} - {None}) == len(keys)


SD1_NAMES = {
    "unet": [
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
        "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lycoris_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
    ],
    "te": [
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj",
        "lycoris_te_text_model_encoder_layers_3_self_attn_q_proj",
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        "text_encoder.encoder.layers.3.self_attn.q_proj",
        "text_encoder.text_model.encoder.layers.3.self_attn.to_q",
        "base_model.model.text_model.encoder.layers.3.self_attn.q_proj",
        "clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj",
    ],
}


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in SD1_NAMES.items() for key in keys])
def test_every_way_to_write_a_name_means_the_same_module(part: str, key: str):
    where = {
        "unet": "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
        "te": "text_model.encoder.layers.3.self_attn.q_proj",
    }
    assert locate(key, known("sd1")) == Place(part, where[part])


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "te1"),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", "te1"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "te2"),
        ("text_encoder_2.text_model.encoder.layers.3.mlp.fc1", "te2"),
        ("clip_g.transformer.text_model.encoder.layers.3.mlp.fc1", "te2"),
    ],
)
def test_the_two_encoders_of_sdxl_are_told_apart(key: str, part: str):
    assert locate(key, known("sdxl")) == Place(part, "text_model.encoder.layers.3.mlp.fc1")


@pytest.mark.parametrize(
    "key",
    ["", "lora_unet_", "lora_unet_middle_block_9", "lora_te2_text_model_encoder_layers_0_mlp_fc1", "te"],
)
def test_what_the_model_lacks_is_not_found(key: str):
    assert locate(key, known("sd1")) is None


@pytest.mark.parametrize("family", CONFIGS)
def test_the_unet_has_the_names_and_shapes_of_diffusers(family: str):
    models = published(family)
    unet = models.unet
    renamed = {to_diffusers(name, unet.config): tuple(w.shape) for name, w in unet.named_parameters()}
    assert len(renamed) == len(list(unet.parameters()))  # so the rule can be turned round
    if family != "sd2":
        wanted = manifest({"sd1": "diffusers-unet-sd15", "sdxl": "diffusers-unet-sdxl"}[family])["tensors"]
        assert renamed == {key: tuple(value["shape"]) for key, value in wanted.items()}


@pytest.mark.parametrize("family", BY_NAME)
def test_no_two_modules_of_a_family_share_a_name(family: str):
    models = tiny(family)
    found = names(models)
    for part, network in parts(models).items():
        for name, module in network.named_modules():
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                assert found[f"{part}/{name.removeprefix('text_model.').replace('.', '_')}"].name == name
    places = set(found.values())
    assert len({kohya_key(models, place) for place in places}) == len(places)
