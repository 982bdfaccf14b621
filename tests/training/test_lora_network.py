"""What is trained: it starts from nothing, touches nothing else, and its file loads."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ldm.lora
from ldm.denoise import Denoiser, Prediction
from ldm.families.sd1 import SD1
from ldm.families.sd2 import SD2
from ldm.families.sdxl import SDXL
from ldm.models import Models
from ldm.schedules import NoiseSchedule
from ldm.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipTextModel
from ldm.training.lora import (
    checkpointed,
)
from ldm.training.lora_network import LoraNetwork, NetworkConfig
from ldm.unet import SD1_UNET, SD2_UNET, SDXL_UNET, UNet
from tests.golden import golden
from tests.tiny_families import tiny
from tests.training.lora_cases import (
    CASES,
    DORA,
    KINDS,
    LORA,
    generator,
    output,
    randomised,
    snapshot,
)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_new_network_changes_no_bit_of_the_output(family: str, kind: str):
    models = tiny(family)
    with torch.no_grad():
        before = output(models)
        with LoraNetwork(models, KINDS[kind]).attached():
            assert torch.equal(output(models), before)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_file_gives_what_the_network_gave(tmp_path: Path, family: str, kind: str):
    models = tiny(family)
    network = randomised(models, KINDS[kind])
    path = tmp_path / "style.safetensors"
    snapshot(network).save(path, {}, torch.float32)
    with torch.no_grad():
        before = output(models)
        with network.attached():
            trained = output(models)
        assert torch.equal(output(models), before)  # detached, nothing is left
        lora = ldm.lora.read(path)
        assert ldm.lora.coverage(models, lora).unmatched == ()
        with ldm.lora.applied(models, [(lora, 1.0)]):
            loaded = output(models)
    assert (trained - before).abs().max() > 1e-2
    # W x + s B A x against (W + s B A) x: rounding of float32, on outputs of about 1.
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-5)


META = {
    "lora-kohya-sd15-with-conv3x3": (SD1, SD1_UNET, (CLIP_L,), 2),
    "lora-kohya-sd2": (SD2, SD2_UNET, (OPENCLIP_H,), 0),
    "lora-kohya-sdxl-with-conv3x3": (SDXL, SDXL_UNET, (CLIP_L, OPENCLIP_BIGG), 2),
}


@pytest.mark.parametrize("manifest", META)
def test_names_and_shapes_are_those_of_kohyas_trainer(manifest: str):
    family, unet, texts, conv_dim = META[manifest]
    with torch.device("meta"):
        denoiser = Denoiser(UNet(unet), NoiseSchedule.scaled_linear(), Prediction.EPS)
        models = Models(family, denoiser, None, tuple(ClipTextModel(text) for text in texts))
    network = LoraNetwork(models, NetworkConfig(network_dim=4, network_alpha=2.0, conv_dim=conv_dim))
    made = {name: list(w.shape) for name, w in network.state_dict().items()}
    with gzip.open(golden(f"manifests/{manifest}.json.gz")) as file:
        assert made == json.load(file)["tensors"]


def test_the_scale_is_alpha_over_rank():
    models = tiny("sd1")
    key = "lora_unet_mid_block_attentions_0_proj_in"
    outputs = []
    for alpha in (2.0, 6.0):
        network = LoraNetwork(models, NetworkConfig(network_dim=4, network_alpha=alpha), text=False)
        nn.init.ones_(network[key].lora_up.weight)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        layer = network.layers[key]
        x = torch.randn(1, 64, 2, 2, generator=generator())
        with torch.no_grad():
            before = layer(x)
            with network.attached():
                outputs.append(layer(x) - before)
    torch.testing.assert_close(outputs[1], 3 * outputs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_only_the_additions(kind: str):
    models = tiny("embedded")
    network = randomised(models, KINDS[kind])
    with network.attached():
        output(models).square().mean().backward()
    assert all(p.grad is None for part in (models.unet, *models.text) for p in part.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_checkpointing_gives_the_same_gradients_and_leaves_the_model_as_it_was(family: str):
    models = tiny(family)
    names = [name for name, _ in models.unet.named_modules()]
    gradients = []
    for saving in (False, True):
        network = randomised(models, DORA)
        with network.attached():
            if saving:
                with checkpointed(models):
                    output(models).square().mean().backward()
            else:
                output(models).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert [name for name, _ in models.unet.named_modules()] == names


def test_parts_with_rate_zero_get_no_additions():
    models = tiny("sdxl")
    assert all(key.startswith("lora_unet_") for key in LoraNetwork(models, LORA, text=False))
    text = LoraNetwork(models, LORA, unet=False)
    assert {key[:9] for key in text} == {"lora_te1_", "lora_te2_"}
