"""The Stable Diffusion x4 upscaler equals that of diffusers with the same weights and noise."""

from typing import Any

import pytest
import torch

from ldm.models import Models
from ldm.upscalers.x4 import X4Upscaler
from tests.peers.test_diffusers_pipeline import peer_embeddings, peer_vae
from tests.tiny_families import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers, with numpy 2

# The schedule of the noise of both pictures, in diffusers' words.
TRAINED = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "scaled_linear"}


def peer_pipeline(models: Models) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale import (
        StableDiffusionUpscalePipeline,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    config = models.unet.config
    widths = tuple(config.model_channels * mult for mult in config.channel_mult)
    unet_class: Any = UNet2DConditionModel  # its annotations are narrower than what it takes
    unet = unet_class(
        in_channels=7,
        num_class_embeds=1000,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim,
        attention_head_dim=tuple(config.heads(width) for width in widths),  # in truth, the number of heads
        use_linear_projection=True,
    )
    unet.load_state_dict(convert_ldm_unet_checkpoint(models.state_dict(), unet.config))
    pipeline_class: Any = StableDiffusionUpscalePipeline
    pipeline = pipeline_class(
        vae=peer_vae(models),
        unet=unet.eval(),
        text_encoder=None,
        tokenizer=None,
        low_res_scheduler=DDPMScheduler(**TRAINED),
        scheduler=DDIMScheduler(
            **TRAINED,
            prediction_type="v_prediction",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=True,
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("cfg_scale", "noise_level"), [(9.0, 20), (1.0, 350)])
def test_the_latent_equals_that_of_diffusers(cfg_scale: float, noise_level: int) -> None:
    models = tiny("x4-upscaler")
    upscaler = X4Upscaler(
        models,
        steps=8,
        prompt="a red apple",
        negative_prompt="blurry",
        noise_level=noise_level,
        cfg_scale=cfg_scale,
        seed=5,
    )
    small = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = peer_pipeline(models)(
        image=small / 2 + 0.5,
        **peer_embeddings(models, "a red apple", "blurry"),
        num_inference_steps=8,
        guidance_scale=cfg_scale,
        noise_level=noise_level,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    # Relative to the largest value: diffusers keeps its table of noise levels in float32. Measured: 2e-6.
    torch.testing.assert_close(
        upscaler.draw(small), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )
