"""Whole pictures equal those of diffusers and transformers with the same weights and noise."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.denoise import Prediction
from ldm.families import ClipPart
from ldm.models import Models
from ldm.pipeline import pictures, plan, sample
from ldm.request import Request
from ldm.samplers import Step
from ldm.text.clip import ClipTextModel
from ldm.text.tokenizer import Tokenizer
from tests.tiny_families import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers, with numpy 2

# The schedule of all of Stable Diffusion, in diffusers' words.
TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def peer_unet(models: Models) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config = models.unet.config
    widths = [config.model_channels * mult for mult in config.channel_mult]
    kinds = ["CrossAttn" if depth else "" for depth in config.depth]
    sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.vector_dim,
    }
    peer_class: Any = UNet2DConditionModel  # its annotations are narrower than what it takes
    peer = peer_class(
        sample_size=64,  # the usual size of a latent, which some pipelines ask for
        in_channels=config.in_channels,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        block_out_channels=tuple(widths),
        layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim,
        attention_head_dim=tuple(config.heads(width) for width in widths),  # in truth, the number of heads
        use_linear_projection=config.linear_projection,
        **({} if config.vector_dim is None else sizes),
    )
    peer.load_state_dict(convert_ldm_unet_checkpoint(models.state_dict(), peer.config))
    return peer.eval()


def peer_vae(models: Models) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    assert models.vae is not None
    config = models.vae.config
    levels = len(config.ch_mult)
    peer_class: Any = AutoencoderKL
    peer = peer_class(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * mult for mult in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        scaling_factor=config.scale,
    )
    peer.load_state_dict(convert_ldm_vae_checkpoint(models.state_dict(), peer.config))
    return peer.eval()


@torch.no_grad()
def peer_states(encoder: ClipTextModel, part: ClipPart, prompt: str) -> tuple[Tensor, Tensor]:
    """The states that the family's pipeline in diffusers takes, and the pooled vector, from transformers."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = encoder.config
    peer = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act="quick_gelu" if part.quick_gelu else "gelu",
            eos_token_id=49407,
        )
    ).eval()
    outcome = peer.load_state_dict(encoder.state_dict(), strict=False)
    assert set(outcome.missing_keys) <= {"text_projection.weight"}
    assert not outcome.unexpected_keys
    tokens = Tokenizer().pad(Tokenizer().encode(prompt), pad_id=part.pad_id)
    output = peer(torch.tensor([tokens]), output_hidden_states=True)
    states = output.hidden_states[-part.skip]
    if part.final_norm:
        states = peer.text_model.final_layer_norm(states)
    return states, output.text_embeds


def peer_embeddings(models: Models, prompt: str, negative: str) -> dict[str, Tensor]:
    """What a pipeline of diffusers would get from its text encoders."""
    named: dict[str, Tensor] = {}
    for start, text in (("", prompt), ("negative_", negative)):
        both = []
        for encoder, part in zip(models.text, models.family.parts, strict=True):
            assert isinstance(encoder, ClipTextModel)
            assert isinstance(part, ClipPart)
            both.append(peer_states(encoder, part, text))
        named[f"{start}prompt_embeds"] = torch.cat([states for states, _ in both], dim=2)
        if models.family.vector is not None:
            named[f"{start}pooled_prompt_embeds"] = both[-1][1]
    return named


def peer_pipeline(models: Models, scheduler: Any) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    parts: dict[str, Any] = {
        "vae": peer_vae(models),
        "unet": peer_unet(models),
        "scheduler": scheduler,
        "text_encoder": None,
        "tokenizer": None,
    }
    if models.unet.config.vector_dim is not None:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        pipeline: Any = StableDiffusionXLPipeline(**parts)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def schedulers(prediction: str) -> Mapping[str, Any]:
    """Our samplers' counterparts, with the settings under which the two mean the same."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    settings: dict[str, Any] = {**TRAINED, "prediction_type": prediction, "steps_offset": 1}
    return {
        "DDIM": DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=True),
        "Euler Karras": EulerDiscreteScheduler(**settings, use_karras_sigmas=True),
    }


@pytest.mark.parametrize("sampler", ["DDIM", "Euler Karras"])
@pytest.mark.parametrize("name", ["sd1", "sd2-eps", "sd2-v", "sdxl"])
def test_pictures_equal_those_of_diffusers(name: str, sampler: str):
    family, _, prediction = name.partition("-")
    models = tiny(family, Prediction.V if prediction == "v" else Prediction.EPS)
    request = Request(
        prompt="a red apple on a table",
        negative_prompt="blurry, dark",
        width=64,
        height=72,
        steps=8,
        cfg_scale=5.0,
        cfg_rescale=0.7 if prediction == "v" else 0.0,  # diffusers rescales in what the network predicts
        sampler=sampler,
        seed=3,
    )
    latents = deque[Step](sample(models, request), maxlen=1).pop().x
    [picture] = pictures(models, plan(models, request), latents)

    prediction_type = "v_prediction" if prediction == "v" else "epsilon"
    pipeline = peer_pipeline(models, schedulers(prediction_type)[sampler])
    arguments = {
        **peer_embeddings(models, request.prompt, request.negative_prompt),
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.steps,
        "guidance_scale": request.cfg_scale,
        "guidance_rescale": request.cfg_rescale,
        "latents": torch.randn(1, 4, 9, 8, generator=torch.Generator().manual_seed(3)),
    }
    expected = pipeline(**arguments, output_type="latent").images
    with torch.no_grad():
        decoded = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    levels = pipeline.image_processor.postprocess(decoded, output_type="np")[0] * 255

    # Relative to the largest value: diffusers keeps its table of noise levels in float32. Measured: 6e-6.
    torch.testing.assert_close(latents, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert np.abs(np.asarray(picture) - levels).max() < 0.51  # of which 0.5 is our rounding to 8 bits


def test_an_empty_negative_prompt_is_zeros_in_sdxl_as_in_diffusers():
    models = tiny("sdxl")
    request = Request(prompt="a cat", width=64, height=64, steps=4, cfg_scale=5.0, sampler="DDIM")
    latents = deque[Step](sample(models, request), maxlen=1).pop().x
    pipeline = peer_pipeline(models, schedulers("epsilon")["DDIM"])
    assert pipeline.config.force_zeros_for_empty_prompt
    embeddings = peer_embeddings(models, request.prompt, "")
    for kind in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        embeddings[kind] = torch.zeros_like(embeddings[kind])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        **embeddings,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(latents, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
