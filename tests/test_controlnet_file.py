"""ControlNet files of every layout load, by names and shapes alone; what is no ControlNet is named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.building import shapes_of
from ldm.controlnet import ControlNet, ControlNetConfig
from ldm.controlnet_file import CONTROL, controlnet_config, load_controlnet, original_names
from ldm.errors import CheckpointError
from ldm.formats import write_safetensors
from ldm.models import Models
from ldm.rename import from_diffusers, to_diffusers
from ldm.unet import SD1_UNET, SD2_UNET, SDXL_UNET, UNet, UNetConfig
from tests.test_names import manifest, without_memory
from tests.tiny_families import tiny

PUBLISHED = {
    "controlnet-sd15": SD1_UNET,
    "controlnet-sd21": SD2_UNET,
    "controlnet-sd15-full": SD1_UNET,
    "diffusers-controlnet-sd15": SD1_UNET,
    "diffusers-controlnet-sdxl": SDXL_UNET,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_files(name: str):
    unet = PUBLISHED[name]
    weights = original_names(without_memory(manifest(name)))
    config = controlnet_config(shapes_of(weights), num_heads=unet.num_heads, head_dim=unet.head_dim)
    assert config == ControlNetConfig(unet=unet)
    with torch.device("meta"):
        network = ControlNet(config)
    assert shapes_of(network.state_dict()) == shapes_of(weights)
    assert not list(network.buffers())  # a buffer would stay on meta, or be in no file


@pytest.mark.parametrize("config", [SD1_UNET, SDXL_UNET], ids=["SD1", "SDXL"])
def test_renaming_there_and_back_gives_the_same_names(config: UNetConfig):
    with torch.device("meta"):
        names = [n for n in UNet(config).state_dict() if not n.startswith(("output_blocks.", "out."))]
    for name in names:
        assert from_diffusers(to_diffusers(name, config), config.num_res_blocks, 6) == name


def weights_for(models: Models, factor: int = 8) -> dict[str, Tensor]:
    """A random ControlNet for a model, by the original names."""
    torch.manual_seed(0)
    widths = ControlNetConfig().hint_widths[: factor.bit_length()]
    return ControlNet(ControlNetConfig(unet=models.unet.config, hint_widths=widths)).state_dict()


def saved(weights: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        write_safetensors(path, weights)
    else:
        torch.save({"state_dict": weights} if path.suffix == ".ckpt" else weights, path)
    return path


@pytest.mark.parametrize("prefix", ["", CONTROL], ids=["bare", "prefixed"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pth"])
def test_every_kind_of_file_loads(ending: str, prefix: str, tmp_path: Path):
    models, weights = tiny("sd1"), weights_for(tiny("sd1"))
    path = saved({prefix + name: w for name, w in weights.items()}, tmp_path / f"control.{ending}")
    network = load_controlnet(path, models)
    assert all(torch.equal(w, weights[name]) for name, w in network.state_dict().items())
    assert replace(network.config, out_channels=4) == models.unet.config
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "embedded"])
def test_a_controlnet_inside_a_whole_checkpoint_loads(name: str, tmp_path: Path):
    models = tiny(name)
    factor = 4 if name == "embedded" else 8
    weights = {CONTROL + key: w for key, w in weights_for(models, factor).items()}
    network = load_controlnet(saved(models.state_dict() | weights, tmp_path / "whole.safetensors"), models)
    assert isinstance(network, ControlNet)
    assert network.factor == factor
    assert network.config.heads(64) == models.unet.config.heads(64)


def test_half_precision_is_kept_or_converted(tmp_path: Path):
    models = tiny("sd1")
    half = {name: w.half() for name, w in weights_for(models).items()}
    path = saved(half, tmp_path / "control.safetensors")
    assert next(load_controlnet(path, models).parameters()).dtype == torch.float32
    assert next(load_controlnet(path, models, dtype=torch.float16).parameters()).dtype == torch.float16


def test_a_controlnet_for_another_model_is_refused(tmp_path: Path):
    path = saved(weights_for(tiny("sd1")), tmp_path / "control.safetensors")
    with pytest.raises(CheckpointError, match="the ControlNet is for another model"):
        load_controlnet(path, tiny("sdxl"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["difference", "input_hint_block.0.weight"], "holds only differences"),
        (["lora_controlnet", "input_hint_block.0.weight"], "Control-LoRA"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a model without a ControlNet in it"),
        (["something"], "no ControlNet"),
    ],
)
def test_what_is_no_controlnet_is_named(names: list[str], message: str, tmp_path: Path):
    path = saved({name: torch.ones(1) for name in names}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=f"file.safetensors: .*{message}"):
        load_controlnet(path, tiny("sd1"))


def test_missing_unknown_and_broken_weights_are_refused(tmp_path: Path):
    models, weights = tiny("sd1"), weights_for(tiny("sd1"))
    key, hint = "zero_convs.1.0.weight", "input_hint_block.0.weight"
    for number, (wrong, message) in enumerate(
        [
            ({n: w for n, w in weights.items() if n != key}, f"1 of .* are missing, first: {key}"),
            (weights | {"zero_convs.9.0.weight": weights[key]}, "1 unknown ControlNet weights"),
            (weights | {key: weights[key][:, :1]}, "wrong shape"),
            (weights | {hint: torch.zeros(16, 6, 3, 3)}, "a hint of 6 channels; a picture has 3"),
            (weights | {key: weights[key] * float("nan")}, "NaN"),
            ({n: w for n, w in weights.items() if not n.startswith("input_blocks.0")}, "incomplete"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load_controlnet(saved(wrong, tmp_path / f"{number}.safetensors"), models)
        assert len(str(error.value)) <= 200
