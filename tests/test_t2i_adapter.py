"""T2I-Adapters equal those of diffusers, alone and inside the UNet; the files of both kinds load."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.building import shapes_of
from ldm.controlnet import Control, Controlled, PreparedAdapter, prepared, scales
from ldm.controlnet_file import load_controlnet
from ldm.errors import CheckpointError, RequestError
from ldm.formats import write_safetensors
from ldm.models import Models
from ldm.t2i_adapter import SOFT, Adapter, AdapterConfig, adapter_config
from ldm.unet import SD1_UNET, UNet
from tests.test_unet import TINY, diffusers_unet, randomised
from tests.tiny_families import tiny

UNET = replace(TINY, channel_mult=(1, 2, 2, 2), num_res_blocks=2, depth=(1, 1, 1, 0))
FULL = AdapterConfig(widths=UNET.widths)
KINDS = {
    "full": FULL,
    "full, of edges": replace(FULL, hint_channels=1),
    "light": replace(FULL, num_res_blocks=4, light=True),
}


def models() -> Models:
    denoiser = replace(tiny("sd1").denoiser, network=UNet(UNET))
    return replace(tiny("sd1"), denoiser=denoiser)


def adapter(config: AdapterConfig) -> Adapter:
    torch.manual_seed(0)
    return Adapter(config).requires_grad_(False)


def diffusers_adapter(config: AdapterConfig) -> Any:
    from diffusers.models.adapter import T2IAdapter

    torch.manual_seed(1)
    peer = T2IAdapter(
        in_channels=config.hint_channels,
        channels=[*config.widths[: 3 if config.light else 4]],  # a light one repeats the last
        num_res_blocks=config.num_res_blocks,
        adapter_type="light_adapter" if config.light else "full_adapter",
    )
    return peer.eval().requires_grad_(False)


def given(config: AdapterConfig, height: int = 128, width: int = 128) -> Tensor:
    """A random hint; the channels of one for edges are equal."""
    torch.manual_seed(2)
    return torch.rand(1, config.hint_channels, height, width)


@pytest.mark.parametrize("size", [(128, 128), (72, 120)], ids=["even", "odd sizes"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers_from_its_own_file(kind: str, size: tuple[int, int], tmp_path: Path):
    config = KINDS[kind]
    peer = diffusers_adapter(config)
    write_safetensors(tmp_path / "adapter.safetensors", peer.state_dict())
    ours = load_controlnet(tmp_path / "adapter.safetensors", models())
    assert isinstance(ours, Adapter)
    assert ours.config == config
    hint = given(config, *size)
    for found, expected in zip(ours(hint.expand(1, 3, -1, -1)), peer(hint), strict=True):
        # Values are of order 1; both sum in float32 in a different order.
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_leads_the_unet_as_in_diffusers():
    unet, network = randomised(UNET), adapter(FULL)
    picture = Image.radial_gradient("L").resize((128, 128))
    ready = prepared(Control(network, picture, 0.7), UNET, width=128, height=128, factor=8)
    assert isinstance(ready, PreparedAdapter)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([20, 700]), torch.randn(2, 5, 16)
    features = [0.7 * one for one in network(hint_tensor(picture))]
    expected = diffusers_unet(unet)(
        x,
        t,
        context,
        down_intrablock_additional_residuals=[f.expand(2, -1, -1, -1).clone() for f in features],
    ).sample
    led = Controlled(unet, [ready])(x, t, context)
    # Outputs are of order 1; both sum in float32 in a different order.
    torch.testing.assert_close(led, expected, atol=1e-5, rtol=1e-5)
    assert (led - unet(x, t, context)).abs().max() > 0.01


def hint_tensor(picture: Image.Image) -> Tensor:
    levels = torch.tensor([*picture.tobytes()]).view(1, 1, *picture.size).float() / 255
    return levels.expand(1, 3, -1, -1)


def test_several_add_up_and_weight_0_changes_nothing():
    unet, network = randomised(UNET), adapter(FULL)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([20]), torch.randn(1, 5, 16)

    def ready(weight: float) -> PreparedAdapter:
        control = Control(network, Image.linear_gradient("L"), weight)
        found = prepared(control, UNET, width=64, height=64, factor=8)
        assert isinstance(found, PreparedAdapter)
        return found

    assert torch.equal(Controlled(unet, [ready(0.0)])(x, t, context), unet(x, t, context))
    # 0.25 and 0.5 add up without rounding, products of them may not.
    both, once = Controlled(unet, [ready(0.25), ready(0.5)]), Controlled(unet, [ready(0.75)])
    torch.testing.assert_close(both(x, t, context), once(x, t, context), atol=1e-5, rtol=1e-5)
    nested = Controlled(Controlled(unet, [ready(0.25)]), [ready(0.5)])
    torch.testing.assert_close(nested(x, t, context), once(x, t, context), atol=1e-5, rtol=1e-5)


def test_soft_weights_favour_the_deeper_levels():
    control = Control(adapter(FULL), Image.new("RGB", (8, 8)), weight=0.5, mode="prompt")
    assert scales(control, 4) == tuple(0.5 * soft for soft in SOFT)


@pytest.mark.parametrize("kind", KINDS)
def test_original_files_load(kind: str, tmp_path: Path):
    weights = adapter(KINDS[kind]).state_dict()
    torch.save(weights, tmp_path / "adapter.pth")
    loaded = load_controlnet(tmp_path / "adapter.pth", models())
    assert all(torch.equal(w, weights[name]) for name, w in loaded.state_dict().items())


def names_of_published_full() -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(Adapter(AdapterConfig()).state_dict())


def test_the_published_shape_is_the_default():
    """Mou et al. 2023: "~77M parameters"."""
    shapes = names_of_published_full()
    assert sum(math.prod(shape) for shape in shapes.values()) == 77_369_280
    assert adapter_config(shapes) == AdapterConfig(widths=SD1_UNET.widths)
    assert shapes["conv_in.weight"] == (320, 192, 3, 3)
    assert shapes["body.2.in_conv.weight"] == (640, 320, 1, 1)
    assert "body.1.in_conv.weight" not in shapes
    assert shapes["body.7.block2.weight"] == (1280, 1280, 1, 1)


def test_an_adapter_for_another_model_or_of_another_kind_is_refused(tmp_path: Path):
    weights = adapter(FULL).state_dict()
    write_safetensors(tmp_path / "a.safetensors", weights)
    with pytest.raises(CheckpointError, match="the T2I-Adapter is for another model"):
        load_controlnet(tmp_path / "a.safetensors", tiny("sd1"))
    with pytest.raises(RequestError, match="8, the model 4"):
        prepared(Control(adapter(FULL), Image.new("RGB", (8, 8))), UNET, width=64, height=64, factor=4)
    sdxl = weights | {"conv_in.weight": torch.zeros(32, 768, 3, 3)}
    write_safetensors(tmp_path / "b.safetensors", sdxl)
    with pytest.raises(CheckpointError, match="such as SDXL's, which ldm does not read"):
        load_controlnet(tmp_path / "b.safetensors", models())
