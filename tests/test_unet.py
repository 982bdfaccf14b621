"""The UNet equals the originals: golden outputs, and diffusers live."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.unet import UNet, UNetConfig, timestep_embedding
from tests.golden import golden, module_case

TINY = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, depth=(1, 1), context_dim=16, num_heads=2
)
TEXTLESS = replace(TINY, context_dim=None)
WIDTH_16 = replace(TINY, num_heads=None, head_dim=16)

CASES = {
    "unet_sd1": TINY,
    "unet_sd1_depth2_attn_ds2_only": replace(
        TINY, channel_mult=(1, 1), num_res_blocks=2, depth=(0, 2), middle_depth=2
    ),
    "unet_sd1_inpaint_9ch": replace(TINY, channel_mult=(1, 1), in_channels=9),
    "unet_ldm_cin_1head_legacy": replace(TINY, in_channels=3, out_channels=3, num_heads=1),
    "unet_ldm_headch_legacy": replace(WIDTH_16, depth=(0, 1)),
    "unet_ldsr_attnblock_concat": replace(WIDTH_16, in_channels=6, out_channels=3, context_dim=None),
    "unet_attnblock_new_order": replace(
        TEXTLESS, channel_mult=(1, 1), depth=(0, 1), num_heads=4, new_attention_order=True
    ),
    "unet_scaleshift_updown_classes": replace(
        TEXTLESS, depth=(0, 1), scale_shift_norm=True, resblock_updown=True, num_classes=10
    ),
    "unet_sd2_linear": replace(WIDTH_16, linear_projection=True),
    "unet_sd2_x4upscaler_style": replace(
        TINY,
        in_channels=7,
        channel_mult=(1, 1),
        depth=(0, 1),
        linear_projection=True,
        cross_only=(True, False),
        num_classes=50,
    ),
    "unet_sdxl": replace(WIDTH_16, depth=(0, 2), middle_depth=2, linear_projection=True, vector_dim=24),
    "unet_sdxl_refiner": replace(
        WIDTH_16, depth=(0, 2), middle_depth=2, linear_projection=True, vector_dim=20
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(name: str):
    weights, values = module_case(name)
    unet = UNet(CASES[name]).requires_grad_(False)
    unet.load_state_dict(weights)
    out = unet(values["in/x"], values["in/timesteps"], values.get("in/context"), values.get("in/y"))
    # Outputs are of order 1 and the originals' own float32 rounding is 3e-6.
    torch.testing.assert_close(out, values["out/out"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("width", [32, 33, 256, 320])
def test_timestep_embedding_equals_the_original(width: int):
    values = load_file(golden("modules/timestep_embedding.safetensors"))
    # At t = 999 one rounding of the angle is 6e-5; cosine and sine pass it on.
    torch.testing.assert_close(
        timestep_embedding(values["t"], width), values[f"emb_{width}"], atol=1e-4, rtol=0
    )


def randomised(config: UNetConfig) -> UNet:
    """A UNet in which no parameter is 0 or 1: as initialised, an error in a bias or norm would not show."""
    torch.manual_seed(0)
    unet = UNet(config).requires_grad_(False)
    for parameter in unet.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return unet


LEVELS = replace(TINY, channel_mult=(1, 2, 2), num_res_blocks=2)
LIVE = {
    "SD1": replace(LEVELS, depth=(1, 1, 0)),
    "SD2": replace(LEVELS, depth=(1, 1, 0), num_heads=None, head_dim=16, linear_projection=True),
    "SDXL": replace(
        LEVELS,
        depth=(0, 1, 2),
        middle_depth=2,
        num_heads=None,
        head_dim=16,
        linear_projection=True,
        vector_dim=64,
    ),
}


def diffusers_unet(unet: UNet) -> Any:
    """The same network with the same weights in diffusers, whose own converter renames them."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config = unet.config
    widths = [config.model_channels * mult for mult in config.channel_mult]
    arguments: dict[str, Any] = {}
    if config.vector_dim is not None:  # 16 from the text, 6 numbers of width 8
        arguments = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    kinds = ["CrossAttn" if depth else "" for depth in config.depth]
    peer_class: Any = UNet2DConditionModel  # its annotations are narrower than what it takes
    peer = peer_class(
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        block_out_channels=tuple(widths),
        layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim,
        attention_head_dim=tuple(config.heads(width) for width in widths),  # in truth, the number of heads
        transformer_layers_per_block=tuple(max(1, depth) for depth in config.depth),
        use_linear_projection=config.linear_projection,
        **arguments,
    )
    original = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}
    peer.load_state_dict(convert_ldm_unet_checkpoint(original, peer.config))
    return peer.eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(2, 8, 8), (1, 9, 7)], ids=["even", "odd sizes, one picture"])
@pytest.mark.parametrize("family", LIVE)
def test_equals_diffusers(family: str, size: tuple[int, int, int]):
    unet = randomised(LIVE[family])
    batch, height, width = size
    x, context = torch.randn(batch, 4, height, width), torch.randn(batch, 5, 16)
    t = torch.tensor([3, 731])[:batch]
    y, extra = None, {}
    if unet.config.vector_dim is not None:
        text, numbers = torch.randn(batch, 16), torch.randint(1024, (batch, 6))
        y = torch.cat([text, timestep_embedding(numbers.flatten(), 8).view(batch, -1)], dim=1)
        extra = {"added_cond_kwargs": {"text_embeds": text, "time_ids": numbers}}
    expected = diffusers_unet(unet)(x, t, context, **extra).sample
    # Outputs are of order 1; both sum in float32 in a different order.
    torch.testing.assert_close(unet(x, t, context, y), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", LIVE)
def test_control_residuals_equal_those_in_diffusers(family: str):
    unet = randomised(LIVE[family])
    peer = diffusers_unet(unet)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([20]), torch.randn(1, 5, 16)
    y, extra = None, {}
    if unet.config.vector_dim is not None:
        y = torch.cat([torch.ones(1, 16), timestep_embedding(torch.ones(6), 8).view(1, -1)], dim=1)
        extra = {"added_cond_kwargs": {"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)}}
    shapes: list[torch.Size] = []
    for block in [*unet.input_blocks, unet.middle_block]:
        block.register_forward_hook(lambda block, inputs, output: shapes.append(output.shape))
    unet(x, t, context, y)
    control = [torch.randn(shape) for shape in shapes]
    expected = peer(
        x,
        t,
        context,
        down_block_additional_residuals=control[:-1],
        mid_block_additional_residual=control[-1],
        **extra,
    ).sample
    torch.testing.assert_close(unet(x, t, context, y, control), expected, atol=1e-5, rtol=1e-5)


def inputs(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    y = None
    if config.vector_dim is not None:
        y = torch.randn(2, config.vector_dim)
    elif config.num_classes is not None:
        y = torch.tensor([0, config.num_classes - 1])
    context = None if config.context_dim is None else torch.randn(2, 3, config.context_dim)
    return torch.randn(2, config.in_channels, 8, 8), torch.tensor([5.5, 900.0]), context, y


@pytest.mark.parametrize(
    "name", ["unet_sd1", "unet_ldsr_attnblock_concat", "unet_sdxl", "unet_sd2_x4upscaler_style"]
)
def test_compiles_to_one_graph(name: str):
    unet = randomised(CASES[name])
    arguments = inputs(CASES[name])
    compiled = torch.compile(unet, backend="eager", fullgraph=True)  # an error if the graph breaks
    torch.testing.assert_close(compiled(*arguments), unet(*arguments), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_equals_its_single_pictures(name: str):
    unet = randomised(CASES[name])
    batch = inputs(CASES[name])
    out = unet(*batch)
    for i in range(2):
        single = unet(*(value if value is None else value[i : i + 1] for value in batch))
        # Matrix products of other sizes may sum in another order.
        torch.testing.assert_close(single, out[i : i + 1], atol=1e-5, rtol=1e-5)


def test_no_input_is_changed():
    unet = randomised(CASES["unet_sdxl"])
    given = inputs(CASES["unet_sdxl"])
    copies = [value.clone() for value in given if value is not None]
    unet(*given)
    for value, copy in zip(given, copies, strict=True):
        assert value is not None
        assert torch.equal(value, copy)


def test_missing_or_vain_conditioning_is_refused():
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([1])
    context, y = torch.randn(1, 3, 16), torch.randn(1, 24)
    with pytest.raises(ValueError, match="needs context"):
        UNet(CASES["unet_sd1"])(x, t)
    with pytest.raises(ValueError, match="takes no context"):
        UNet(CASES["unet_attnblock_new_order"])(x, t, context)
    with pytest.raises(ValueError, match="takes no vector"):
        UNet(CASES["unet_sd1"])(x, t, context, y)
    with pytest.raises(ValueError, match="needs vector"):
        UNet(CASES["unet_sdxl"])(x, t, context)
