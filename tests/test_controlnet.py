"""ControlNet equals the original and diffusers, adds up, and refuses what does not fit."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.controlnet import (
    Control,
    Controlled,
    ControlNet,
    ControlNetConfig,
    Prepared,
    check_fit,
    prepared,
    scales,
    to_hint,
)
from ldm.controlnet_file import load_controlnet
from ldm.errors import RequestError
from ldm.formats import write_safetensors
from ldm.hints import canny
from ldm.unet import UNet, UNetConfig, timestep_embedding
from tests.golden import module_case
from tests.test_unet import LIVE, TINY, randomised
from tests.tiny_families import tiny

SINGLE = replace(TINY, channel_mult=(1, 1))
PICTURE = Image.radial_gradient("L").convert("RGB")  # 256 x 256


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}


def controlnet(unet: UNetConfig, widths: tuple[int, ...] = (16, 32, 96, 256), seed: int = 0) -> ControlNet:
    """A ControlNet in which no parameter is 0 or 1."""
    torch.manual_seed(seed)
    network = ControlNet(ControlNetConfig(unet=unet, hint_widths=widths)).requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def ready(network: ControlNet, hint: Tensor, weight: float = 1.0) -> Prepared:
    return Prepared(network, network.features(hint), (weight,) * (len(network.skips) + 1))


def test_equals_the_original():
    weights, values = module_case("controlnet_sd1")
    network = ControlNet(ControlNetConfig(unet=SINGLE)).requires_grad_(False)
    network.load_state_dict(below(weights, "control_model."))
    unet = UNet(SINGLE).requires_grad_(False)
    unet.load_state_dict(below(weights, "diffusion_model."))
    x, t, context = values["in/x"], values["in/timesteps"], values["in/context"]

    residuals = network(x, network.features(values["in/hint"]), t, context)
    for i, residual in enumerate(residuals):
        # Outputs are of order 1 to 2 and the original's own float32 rounding is up to 7e-6.
        torch.testing.assert_close(residual, values[f"out/control_{i}"], atol=2e-5, rtol=0)
    out = Controlled(unet, [ready(network, values["in/hint"])])(x, t, context)
    torch.testing.assert_close(out, values["out/unet_control"], atol=2e-5, rtol=0)
    published = (1.0, 0.8, 0.6, 0.4, 0.2)  # the case's scales; it lists more than there are residuals
    scaled = replace(ready(network, values["in/hint"]), scales=published)
    out = Controlled(unet, [scaled])(x, t, context)
    torch.testing.assert_close(out, values["out/unet_control_scaled"], atol=2e-5, rtol=0)


def diffusers_controlnet(config: UNetConfig) -> Any:
    """A random ControlNet of diffusers, in which no parameter is 0 or 1."""
    from diffusers.models.controlnets.controlnet import ControlNetModel

    kinds = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depth)
    arguments: dict[str, Any] = {}
    if config.vector_dim is not None:  # 16 from the text, 6 numbers of width 8
        arguments = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    torch.manual_seed(1)
    peer_class: Any = ControlNetModel  # its annotations are narrower than what it takes
    peer = peer_class(
        down_block_types=kinds,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim,
        attention_head_dim=tuple(config.heads(width) for width in config.widths),  # in truth, their number
        transformer_layers_per_block=tuple(max(1, depth) for depth in config.depth),
        use_linear_projection=config.linear_projection,
        **arguments,
    ).requires_grad_(False)
    for parameter in peer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return peer.eval()


@pytest.mark.parametrize("size", [(2, 8, 8), (1, 9, 7)], ids=["even", "odd sizes, one picture"])
@pytest.mark.parametrize("family", LIVE)
def test_equals_diffusers_from_its_own_file(family: str, size: tuple[int, int, int], tmp_path: Path):
    config = LIVE[family]
    peer = diffusers_controlnet(config)
    write_safetensors(tmp_path / "control.safetensors", peer.state_dict())
    denoiser = replace(tiny("sd1").denoiser, network=UNet(config))
    network = load_controlnet(tmp_path / "control.safetensors", replace(tiny("sd1"), denoiser=denoiser))
    assert isinstance(network, ControlNet)

    batch, height, width = size
    x, context = torch.randn(batch, 4, height, width), torch.randn(batch, 5, 16)
    hint, t = torch.rand(1, 3, 8 * height, 8 * width), torch.tensor([3, 731])[:batch]
    y, extra = None, {}
    if config.vector_dim is not None:
        text, numbers = torch.randn(batch, 16), torch.randint(1024, (batch, 6))
        y = torch.cat([text, timestep_embedding(numbers.flatten(), 8).view(batch, -1)], dim=1)
        extra = {"added_cond_kwargs": {"text_embeds": text, "time_ids": numbers}}
    down, middle = peer(x, t, context, hint.expand(batch, -1, -1, -1), return_dict=False, **extra)
    found = network(x, network.features(hint), t, context, y)
    for residual, expected in zip(found, [*down, middle], strict=True):
        # Values are of order 1; both sum in float32 in a different order.
        torch.testing.assert_close(residual, expected, atol=1e-5, rtol=1e-5)


# --- at work


def inputs(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, t, context, y of a batch of two."""
    torch.manual_seed(2)
    x, context = torch.randn(2, config.in_channels, 8, 8), torch.randn(2, 3, config.context_dim or 0)
    y = None if config.vector_dim is None else torch.randn(2, config.vector_dim)
    return x, torch.tensor([5.5, 900.0]), context, y


@pytest.mark.parametrize("family", LIVE)
def test_several_controls_add_up(family: str):
    config = LIVE[family]
    unet, given = randomised(config), inputs(config)
    nets = [controlnet(config, seed=seed) for seed in (1, 2)]
    hints = [torch.rand(1, 3, 64, 64) for _ in nets]
    controls = [ready(net, hint, weight) for net, hint, weight in zip(nets, hints, (0.7, 0.4), strict=True)]
    one, other = (control.residuals(*given) for control in controls)
    total = [a + b for a, b in zip(one, other, strict=True)]
    assert torch.equal(Controlled(unet, controls)(*given), unet(*given, total))
    # The order of the sum is another one.
    inner = Controlled(Controlled(unet, controls[:1]), controls[1:])
    torch.testing.assert_close(inner(*given), unet(*given, total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", LIVE)
def test_weight_0_and_no_control_change_nothing(family: str):
    config = LIVE[family]
    unet, given = randomised(config), inputs(config)
    control = ready(controlnet(config), torch.rand(1, 3, 64, 64), weight=0.0)
    assert torch.equal(Controlled(unet, [control])(*given), unet(*given))
    assert torch.equal(Controlled(unet, [])(*given), unet(*given))


def test_each_picture_of_a_batch_gets_the_same_hint():
    unet, (x, t, context, _) = randomised(TINY), inputs(TINY)
    controlled = Controlled(unet, [ready(controlnet(TINY), torch.rand(1, 3, 64, 64))])
    out = controlled(x, t, context)
    for i in range(2):
        single = controlled(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        # Matrix products of other sizes may sum in another order.
        torch.testing.assert_close(single, out[i : i + 1], atol=1e-5, rtol=1e-5)


def test_an_inpainting_model_takes_the_controlnet_of_the_common_one():
    inpainting = replace(TINY, in_channels=9)
    x, t, context, y = inputs(inpainting)
    control = ready(controlnet(TINY), torch.rand(1, 3, 64, 64))
    check_fit(control.network, inpainting, 8)
    found = control.residuals(x, t, context, y)
    first = control.residuals(x[:, :4], t, context, y)
    assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    assert Controlled(randomised(inpainting), [control])(x, t, context).shape == (2, 4, 8, 8)


def test_compiles_to_one_graph():
    network, (x, *others) = controlnet(TINY), inputs(TINY)
    given = (x, network.features(torch.rand(1, 3, 64, 64)), *others)
    compiled = torch.compile(network, backend="eager", fullgraph=True)  # an error if the graph breaks
    for one, other in zip(compiled(*given), network(*given), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("widths", [(16, 32, 96), (16, 32, 96, 256)])
def test_the_hint_network_follows_the_autoencoder(widths: tuple[int, ...]):
    network = controlnet(TINY, widths)
    assert network.factor == 2 ** (len(widths) - 1)
    side = 8 * network.factor
    assert network.features(torch.rand(1, 3, side, side)).shape == (1, 32, 8, 8)


# --- hints and settings


def test_soft_weights_are_those_of_the_original_for_13_residuals():
    soft = scales(Control(controlnet(TINY), PICTURE, weight=0.5, mode="prompt"), 13)
    assert soft == pytest.approx([0.5 * 0.825 ** (12 - i) for i in range(13)])
    assert soft == scales(Control(controlnet(TINY), PICTURE, weight=0.5, mode="control"), 13)
    assert scales(Control(controlnet(TINY), PICTURE, weight=0.5), 3) == (0.5, 0.5, 0.5)


def test_a_control_is_active_between_its_ends():
    def steps(start: float, end: float, count: int = 10) -> list[int]:
        control = Control(controlnet(TINY), PICTURE, start=start, end=end)
        return [step for step in range(count) if control.active(step, count)]

    assert steps(0, 1) == list(range(10))
    assert steps(0, 0.3) == [0, 1, 2]
    assert steps(0.3, 1) == [3, 4, 5, 6, 7, 8, 9]  # the rest
    assert steps(0.3, 0.7) == [3, 4, 5, 6]
    assert steps(0, 1, 1) == [0]
    assert not Control(controlnet(TINY), PICTURE, weight=0).active(0, 10)


def hint_of(picture: Image.Image, width: int, height: int, **settings: Any) -> Tensor:
    return to_hint(Control(controlnet(TINY), picture, **settings), width, height)


def test_a_hint_is_its_picture_in_rgb_from_0_to_1():
    hint = hint_of(Image.new("RGB", (4, 2), (255, 51, 0)), 4, 2)
    assert hint.shape == (1, 3, 2, 4)
    torch.testing.assert_close(hint[0, :, 1, 3], torch.tensor([1.0, 0.2, 0.0]))


def test_what_is_transparent_in_a_hint_is_black():
    picture = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    picture.putpixel((3, 3), (255, 255, 255, 255))
    assert hint_of(picture, 8, 8).sum() == 3


def test_hints_of_any_size_are_made_to_fit():
    wide = Image.new("RGB", (128, 64), "white")
    wide.paste("black", (0, 0, 32, 64))  # the left quarter
    assert hint_of(wide, 64, 64).mean() == 1  # "crop" cuts it off
    assert hint_of(wide, 64, 64, resize="resize").mean() == pytest.approx(0.75, abs=0.01)
    control = Control(controlnet(TINY), wide)
    ready = prepared(control, TINY, width=64, height=48, factor=8)
    assert isinstance(ready, Prepared)
    assert ready.features.shape == (1, 32, 6, 8)


def test_a_picture_is_fitted_before_it_is_turned_into_a_hint():
    large = Image.new("RGB", (512, 512), "white")
    large.paste("black", (128, 128, 384, 384))
    edges = hint_of(large, 64, 64, preprocessor="canny")
    assert set(edges.unique().tolist()) == {0.0, 1.0}  # shrunk lines would be grey
    assert torch.equal(edges, hint_of(canny(large.resize((64, 64), Image.Resampling.LANCZOS)), 64, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -0.1}, "weight of a control must be 0 to 10"),
        ({"weight": float("nan")}, "weight of a control must be 0 to 10"),
        ({"start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"end": 1.5}, "0 <= start < end <= 1"),
        ({"mode": "soft"}, "mode of a control must be balanced, prompt, control, got 'soft'"),
        ({"preprocessor": "depth"}, "preprocessor of a control must be none, canny, invert, tile, threshold"),
        ({"resize": "stretch"}, "resize of a control must be resize, crop, fill, got 'stretch'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        Control(controlnet(TINY), PICTURE, **settings)


@pytest.mark.parametrize(
    ("unet", "factor", "message"),
    [
        (replace(TINY, context_dim=24), 8, "it has text of width 16, the model 24; use one made for"),
        (replace(TINY, vector_dim=8), 8, "it has a vector of width None, the model 8"),
        (replace(TINY, channel_mult=(1, 1)), 8, "levels of width (32, 64), the model (32, 32)"),
        (TINY, 4, "it has pixels per latent pixel: 8, the model 4"),
    ],
)
def test_the_controlnet_of_another_model_is_refused(unet: UNetConfig, factor: int, message: str):
    control = Control(controlnet(TINY), PICTURE)
    with pytest.raises(RequestError, match=re.escape(message)) as error:
        prepared(control, unet, width=64, height=64, factor=factor)
    assert len(str(error.value)) <= 200
