"""Runs from a given picture equal those of diffusers with the same weights and noise.

Of an encoded picture both sides take the mean here; diffusers by itself draws a sample.
"""

from collections import deque
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.compat import Compatibility
from ldm.conditioning import denoisers
from ldm.edit import Edit
from ldm.inputs import Inputs
from ldm.models import Models
from ldm.pipeline import given, plan, sample, start
from ldm.request import Request
from ldm.samplers import Step
from tests.peers.test_diffusers_pipeline import TRAINED, peer_embeddings, peer_unet, peer_vae
from tests.tiny_families import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers, with numpy 2

WIDTH, HEIGHT = 64, 72
SIZE = {"width": WIDTH, "height": HEIGHT}
REQUEST = Request(
    prompt="a red apple on a table",
    negative_prompt="blurry, dark",
    width=WIDTH,
    height=HEIGHT,
    steps=5,
    cfg_scale=5.0,
    seed=3,
    sampler="Euler Karras",
    edit=Edit(strength=0.65, mask_blur=0),
    compat=Compatibility(strength="diffusers"),
)
# Of the largest value: diffusers keeps its table of noise levels in float32. Measured: up to 4e-6.
TOLERANCE = 2e-5


def noise_picture(seed: int = 0) -> Image.Image:
    """Noise in colours, so that no part looks like another."""
    levels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(levels)


PICTURE = noise_picture()
MASK = Image.new("L", (WIDTH, HEIGHT))
MASK.paste(255, (16, 24, 48, 64))  # whole latent pixels


def last(models: Models, request: Request, inputs: Inputs) -> Tensor:
    return deque[Step](sample(models, request, inputs), maxlen=1).pop().x


def assert_same(latents: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert latents.std() > 0.03
    torch.testing.assert_close(latents, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def scheduler(sampler: str) -> Any:
    """The sampler's counterpart, with the settings under which the two mean the same."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    match sampler:
        case "DDIM":
            return DDIMScheduler(**TRAINED, steps_offset=1, clip_sample=False, set_alpha_to_one=True)
        case "DPM++ 2M Turbo":
            return DPMSolverMultistepScheduler(**TRAINED, steps_offset=1, timestep_spacing="trailing")
        case "Euler DDIM":
            return EulerDiscreteScheduler(**TRAINED, steps_offset=1)
        case _:
            return EulerDiscreteScheduler(**TRAINED, steps_offset=1, use_karras_sigmas=True)


@cache
def networks(family: str) -> tuple[Any, Any]:
    """The UNet and the autoencoder of diffusers with the weights of `tiny(family)`."""
    vae = peer_vae(tiny(family))
    encode = vae.encode
    vae.encode = lambda pixels: SimpleNamespace(latents=encode(pixels).latent_dist.mode())
    return peer_unet(tiny(family)), vae


@cache
def texts(family: str) -> dict[str, Tensor]:
    return peer_embeddings(tiny(family), REQUEST.prompt, REQUEST.negative_prompt)


def build(name: str, family: str, sampler: str = "Euler Karras", **parts: Any) -> Any:
    """A pipeline of diffusers around the weights of `tiny(family)`, which gets its texts encoded."""
    import diffusers

    unet, vae = networks(family)
    parts |= {"vae": vae, "unet": unet, "scheduler": scheduler(sampler)}
    parts |= {"text_encoder": None, "tokenizer": None}
    if "XL" in name:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    elif "Depth" in name:
        parts |= {"depth_estimator": None, "feature_extractor": None}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(family: str, **changes: Any) -> dict[str, Any]:
    """What pipelines of diffusers are called with for REQUEST."""
    return {
        **texts(family),
        "num_inference_steps": REQUEST.steps,
        "guidance_scale": REQUEST.cfg_scale,
        "generator": torch.Generator().manual_seed(REQUEST.seed),
        "output_type": "latent",
        **changes,
    }


@pytest.mark.parametrize("strength", [0.65, 0.01, 1.0])
@pytest.mark.parametrize("sampler", ["DDIM", "Euler Karras", "DPM++ 2M Turbo"])
def test_image_to_image_equals_diffusers(sampler: str, strength: float):
    models = tiny("sd1")
    request = replace(REQUEST, sampler=sampler, edit=Edit(strength=strength))
    latents = last(models, request, Inputs(PICTURE))
    pipeline = build("StableDiffusionImg2ImgPipeline", "sd1", sampler)
    # With 0.01 diffusers would make no step at all and complain; we always make one.
    expected = pipeline(image=PICTURE, strength=max(strength, 0.2), **arguments("sd1")).images
    assert_same(latents, expected)


def test_image_to_image_of_sdxl_equals_diffusers():
    models = tiny("sdxl")
    latents = last(models, REQUEST, Inputs(PICTURE))
    pipeline = build("StableDiffusionXLImg2ImgPipeline", "sdxl")
    expected = pipeline(image=PICTURE, strength=0.65, **arguments("sdxl")).images
    assert_same(latents, expected)


# --- masks


@pytest.mark.parametrize("sampler", ["DDIM", "Euler Karras", "DPM++ 2M Turbo"])
def test_inpainting_with_a_common_model_equals_diffusers(sampler: str):
    """Although ours (the web UI's) puts the picture back into `denoised`, and diffusers into x, noised again.

    With the noise of the start, and without noise on the way, both keep x = picture + sigma * noise there.
    A mask that ends within a latent pixel is another matter: ours is rounded, diffusers takes one corner.
    """
    models = tiny("sd1")
    latents = last(models, replace(REQUEST, sampler=sampler), Inputs(PICTURE, MASK))
    pipeline = build("StableDiffusionInpaintPipeline", "sd1", sampler)
    given = {"image": PICTURE, "mask_image": MASK, "strength": 0.65}
    expected = pipeline(**given, **SIZE, **arguments("sd1")).images
    assert_same(latents, expected)


@pytest.mark.parametrize("strength", [1.0, 0.65])
def test_an_inpainting_model_sees_what_it_sees_in_diffusers(strength: float):
    """Ours also puts the picture back around the mask at every step, so that is left out here."""
    models = tiny("sd1-inpaint")
    request = replace(REQUEST, edit=Edit(strength=strength, mask_blur=0))
    run = plan(models, request, Inputs(PICTURE, MASK))
    [guided] = set(denoisers(models, run))
    # At strength 1 diffusers starts from noise alone, and we from the picture below it.
    x, noise, _ = start(models, run, given(models, run) if strength < 1 else None)
    *_, end = run.sampler(guided, x, run.sigmas, noise)

    pipeline = build("StableDiffusionInpaintPipeline", "sd1-inpaint")
    parts = {"image": PICTURE, "mask_image": MASK, "strength": strength}
    expected = pipeline(**parts, **SIZE, **arguments("sd1-inpaint")).images
    assert_same(end.x, expected)


# --- pictures and depth beside the noisy latent


@pytest.mark.parametrize(("cfg_scale", "image_cfg_scale"), [(5.0, 1.7), (1.5, 1.0)])
def test_instruct_pix2pix_equals_diffusers(cfg_scale: float, image_cfg_scale: float):
    models = tiny("pix2pix")
    request = replace(REQUEST, cfg_scale=cfg_scale, image_cfg_scale=image_cfg_scale, edit=Edit())
    latents = last(models, request, Inputs(PICTURE))
    pipeline = build("StableDiffusionInstructPix2PixPipeline", "pix2pix")
    scales = {"guidance_scale": cfg_scale, "image_guidance_scale": image_cfg_scale}
    expected = pipeline(image=PICTURE, **arguments("pix2pix", **scales)).images
    assert_same(latents, expected)


def test_depth_equals_diffusers():
    models = tiny("sd2-depth")
    depth = noise_picture(1).convert("L")
    latents = last(models, REQUEST, Inputs(PICTURE, depth=depth))
    pipeline = build("StableDiffusionDepth2ImgPipeline", "sd2-depth")
    depth_map = torch.from_numpy(np.array(depth, dtype=np.float32)).unsqueeze(0)
    expected = pipeline(image=PICTURE, depth_map=depth_map, strength=0.65, **arguments("sd2-depth")).images
    assert_same(latents, expected)
