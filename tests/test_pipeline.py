"""From a request to pictures, on small random models of every family."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning import conditioning
from ldm.denoise import Conditioning, Denoiser
from ldm.errors import LdmError, PromptError, RequestError, SamplerError
from ldm.families.family import size_embedding
from ldm.models import Models
from ldm.pipeline import decode, plan, sample, txt2img
from ldm.reproduce import diff
from ldm.request import MAX_SEED, Request
from ldm.samplers import SAMPLERS
from ldm.samplers.step import Step
from ldm.text.bert import WordPiece
from tests.tiny_families import tiny

SMALL = Request(prompt="a red apple", width=32, height=24, steps=3, seed=7)


def last(models: Models, request: Request) -> Tensor:
    return deque[Step](sample(models, request), maxlen=1).pop().x


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@contextmanager
def unused(models: Models) -> Iterator[None]:
    """Fail if any network of the models runs inside the block."""

    def complain(module: torch.nn.Module, args: object) -> None:
        raise AssertionError(f"{type(module).__name__} ran")

    assert models.vae is not None
    modules = (models.unet, models.vae.encoder, models.vae.decoder, *models.text)
    handles = [module.register_forward_pre_hook(complain) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- samplers, batches, sizes


@pytest.fixture(scope="module")
def precise() -> Models:
    """The embedded family with networks in float64, so that their rounding does not show in float32."""
    models = tiny("embedded")
    unet, text = (deepcopy(module).double() for module in (models.unet, models.text[0]))
    denoiser = Denoiser(unet, models.denoiser.schedule, models.denoiser.prediction, torch.float64)
    return replace(models, denoiser=denoiser, text=(text,))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(name: str, precise: Models):
    request = replace(SMALL, sampler=name, cfg_scale=5.0)
    batch = last(precise, replace(request, batch_size=2))
    singles = torch.cat([last(precise, replace(request, seed=seed)) for seed in (7, 8)])
    assert batch.isfinite().all()
    # Networks in float64 agree beyond the digits of float32, so this shows that nothing else differs.
    assert torch.equal(batch, singles)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "embedded"])
def test_networks_in_float32_change_a_batch_by_no_more_than_their_rounding(name: str):
    # torch's convolutions sum in another order for another batch size: 1e-7 in one run of the network, of
    # which guidance and three steps make up to 1e-5.
    request = replace(SMALL, cfg_scale=5.0)
    batch = last(tiny(name), replace(request, batch_size=2))
    singles = torch.cat([last(tiny(name), replace(request, seed=seed)) for seed in (7, 8)])
    torch.testing.assert_close(batch, singles, rtol=0, atol=1e-5 * batch.abs().max().item())


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_enough_for_every_sampler(name: str):
    x = last(tiny("sd1"), replace(SMALL, sampler=name, steps=1, cfg_scale=1.0))
    assert x.shape == (1, 4, 3, 4)
    assert x.isfinite().all()


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "embedded"])
@pytest.mark.parametrize(("width", "height"), [(72, 88), (16, 8), (136, 24)])
def test_any_multiple_of_the_latent_pixel_is_a_size(name: str, width: int, height: int):
    [image] = txt2img(tiny(name), replace(SMALL, width=width, height=height, steps=1))
    assert image.size == (width, height)


def test_the_same_request_gives_the_same_picture_to_the_bit():
    request = replace(SMALL, sampler="DPM++ 2M SDE", batch_size=2)
    first, second = (txt2img(tiny("sd1"), request) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]


def test_pictures_of_a_batch_have_seeds_in_a_row_and_say_so():
    batch = txt2img(tiny("sd1"), replace(SMALL, batch_size=3, sampler="Euler a"))
    for i, image in enumerate(batch):
        assert f"Seed: {7 + i}," in image.info["parameters"]
        [single] = txt2img(tiny("sd1"), replace(SMALL, seed=7 + i, sampler="Euler a"))
        assert diff(single, image) == [("Batch size", None, "3"), ("Batch pos", None, str(i))]
        assert np.abs(pixels(image) - pixels(single)).max() <= 1  # a level, from the last digits of float32
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).max() > 10


def test_the_first_draw_of_the_seed_is_the_starting_latent():
    first = next(sample(tiny("sd1"), replace(SMALL, sampler="Euler", cfg_scale=1.0)))
    noise = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(7))
    # Euler's step from x = sigma * noise, solved for x.
    x = first.denoised + (first.x - first.denoised) * (first.sigma / first.sigma_next)
    torch.testing.assert_close(x[0] / first.sigma, noise, atol=1e-5, rtol=1e-5)


def test_stopping_and_watching_is_plain_iteration():
    steps = list(sample(tiny("sd1"), replace(SMALL, sampler="Euler", steps=5)))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert [step.sigma_next for step in steps] == [*(step.sigma for step in steps[1:]), 0.0]


def test_decoding_is_per_picture_and_does_not_change_the_latents():
    latents = torch.randn(3, 4, 3, 4, generator=torch.Generator().manual_seed(0))
    before = latents.clone()
    images = decode(tiny("sd1"), latents)
    assert images.shape == (3, 3, 24, 32)
    assert torch.equal(images[1:2], decode(tiny("sd1"), latents[1:2]))
    assert torch.equal(latents, before)


def test_sampling_leaves_gradients_as_they_were():
    steps = sample(tiny("sd1"), SMALL)
    next(steps)
    assert torch.is_grad_enabled()
    assert not next(steps).x.requires_grad


# --- what is settled before a run


def test_defaults_are_the_familys():
    run = plan(tiny("sdxl"), Request())
    assert (run.width, run.height, run.steps, run.cfg_scale) == (1024, 1024, 20, 7.0)
    assert (run.sampler.name, run.spacing) == ("DPM++ 2M", "karras")
    assert len(run.sigmas) == 21
    assert plan(tiny("class-f4"), Request()).sampler.name == "DDIM"


def test_what_was_settled_makes_the_same_run_again():
    run = plan(tiny("sd1"), replace(SMALL, sampler="dpmpp_2m_sde_exponential"))
    assert run.settled == replace(run.request, sampler="DPM++ 2M SDE", schedule="exponential", cfg_scale=7.0)
    assert plan(tiny("sd1"), run.settled).sigmas == run.sigmas


def test_v_predicting_sd2_is_larger():
    models = tiny("sd2")
    assert plan(models, Request()).width == 512
    v = replace(models, denoiser=replace(models.denoiser, prediction=tiny("embedded").denoiser.prediction))
    assert plan(v, Request()).width == 768


def test_schedule_and_its_range_overrule_the_sampler():
    request = replace(SMALL, sampler="DPM++ 2M Karras", schedule="Exponential", sigma_min=0.1, sigma_max=10.0)
    run = plan(tiny("sd1"), request)
    assert run.spacing == "exponential"
    np.testing.assert_allclose(run.sigmas, (10.0, 1.0, 0.1, 0.0), rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"width": 65}, RequestError, "width must be a multiple of 8, got 65; try 64"),
        ({"height": 12}, RequestError, "height must be a multiple of 8, got 12; try 16"),
        ({"width": 0}, RequestError, "width must be 8 to"),
        ({"height": 100_000}, RequestError, "height must be 8 to"),
        ({"sampler": "Eulr a"}, SamplerError, "did you mean Euler a"),
        ({"schedule": "karas"}, SamplerError, "did you mean 'karras'"),
        ({"sampler": "DPM++ 2M", "eta": 0.5}, SamplerError, "has no option 'eta'"),
        ({"steps": 0}, RequestError, "steps must be 1 to"),
        ({"steps": -3}, RequestError, "steps must be 1 to"),
        ({"cfg_scale": math.nan}, RequestError, "cfg_scale must be a finite number, got nan"),
        ({"cfg_scale": -1.0}, RequestError, "cfg_scale must be 0 to"),
        ({"cfg_rescale": 1.5}, RequestError, "cfg_rescale must be 0 to 1"),
        ({"batch_size": 0}, RequestError, "batch_size must be 1 to"),
        ({"seed": -1}, RequestError, "seed must be 0 to"),
        ({"seed": MAX_SEED, "batch_size": 2}, RequestError, "seed must be 0 to"),
        ({"sigma_min": 5.0, "sigma_max": 1.0}, RequestError, "0 < sigma_min < sigma_max"),
        ({"sampler": "Euler", "rho": 5.0}, RequestError, "has no rho"),
        ({"clip_skip": 0}, RequestError, "clip_skip must be 1 to"),
        ({"sampler": "UniPC", "order": 9}, RequestError, "order must be 1 to"),
        ({"sampler": "Euler a", "eta": math.inf}, RequestError, "eta must be a finite number"),
    ],
)
def test_bad_requests_are_refused_in_one_line_before_any_network_runs(
    changes: dict[str, object], error: type[LdmError], message: str
):
    models = tiny("sd1")
    with unused(models), pytest.raises(error) as caught:
        txt2img(models, replace(SMALL, **changes))  # pyright: ignore[reportArgumentType]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_missing_parts_are_named_before_any_network_runs():
    models = tiny("sd1")
    with unused(models):
        with pytest.raises(LdmError, match="--vae"):
            txt2img(replace(models, vae=None), SMALL)
        with pytest.raises(LdmError, match="no text encoder"):
            txt2img(replace(models, text=()), SMALL)


@pytest.mark.parametrize("name", ["pix2pix", "sd2-depth", "x4-upscaler", "ldsr"])
def test_models_that_need_a_picture_say_so(name: str):
    with unused(tiny(name)), pytest.raises(RequestError, match=r"needs a .*picture"):
        txt2img(tiny(name), SMALL)


def test_more_layers_than_there_are_cannot_be_skipped():
    with pytest.raises(RequestError, match="clip skip must be 1 to 2"):
        txt2img(tiny("sd1"), replace(SMALL, clip_skip=3))


def test_a_broken_network_gives_an_error_and_no_black_picture():
    models = tiny("sd1")
    unet = deepcopy(models.unet)
    unet.time_embed[0].weight.fill_(math.nan)  # pyright: ignore
    with pytest.raises(LdmError, match="NaN"):
        txt2img(replace(models, denoiser=replace(models.denoiser, network=unet)), SMALL)


# --- prompts


def halves(models: Models, request: Request) -> tuple[Conditioning, Conditioning | None]:
    """Both halves of guidance for a prompt that stays the same."""
    guides = conditioning(models, plan(models, request))
    assert all(g is guides[0] for g in guides)
    [(positive, weight)] = guides[0].positive
    assert weight == 1
    return positive, guides[0].negative


def hidden(name: str, prompt: str, *, negative: str = "", **changes: object) -> tuple[Tensor, Tensor | None]:
    """The contexts of both halves of guidance."""
    request = replace(SMALL, prompt=prompt, negative_prompt=negative, **changes)  # pyright: ignore
    cond, uncond = halves(tiny(name), request)
    assert cond.context is not None
    return cond.context, None if uncond is None else uncond.context


def test_prompt_and_negative_prompt_both_matter_unless_guidance_is_off():
    def x(**changes: object) -> Tensor:
        return last(tiny("sd1"), replace(SMALL, sampler="Euler", **changes))  # pyright: ignore

    assert not torch.equal(x(), x(prompt="a green dog"))
    assert not torch.equal(x(), x(negative_prompt="blurry"))
    assert torch.equal(x(cfg_scale=1.0), x(cfg_scale=1.0, negative_prompt="blurry"))
    assert not torch.equal(x(), x(cfg_rescale=0.7))


def test_long_prompts_become_chunks_in_a_row():
    words = "apple " * 80
    long, empty = hidden("sd1", words)
    assert long.shape == (1, 2 * 77, 64)
    assert empty is not None
    assert empty.shape == (1, 77, 64)
    first, _ = hidden("sd1", "apple " * 75)
    assert torch.equal(long[:, :77], first)
    txt2img(tiny("sd1"), replace(SMALL, prompt=words, steps=1))  # halves of different length


def test_clip_skip_takes_earlier_states():
    last_layer, _ = hidden("sd1", "a cat")
    assert torch.equal(last_layer, hidden("sd1", "a cat", clip_skip=1)[0])
    assert not torch.equal(last_layer, hidden("sd1", "a cat", clip_skip=2)[0])
    # SD2 and SDXL were trained on the states before the last layer.
    assert torch.equal(hidden("sd2", "a cat")[0], hidden("sd2", "a cat", clip_skip=2)[0])
    assert torch.equal(hidden("sdxl", "a cat")[0], hidden("sdxl", "a cat", clip_skip=2)[0])


def test_sdxl_reads_two_encoders_the_sizes_and_zeros_for_an_empty_negative_prompt():
    models = tiny("sdxl")
    cond, uncond = halves(models, SMALL)
    assert cond.context is not None
    assert cond.vector is not None
    assert cond.context.shape == (1, 77, 128)
    sizes = size_embedding([24, 32, 0, 0, 24, 32], cond.vector)  # each as (height, width)
    assert torch.equal(cond.vector[:, 64:], sizes)
    assert uncond is not None
    assert uncond.context is not None
    assert uncond.vector is not None
    assert not uncond.context.any()
    assert not uncond.vector[:, :64].any()
    assert torch.equal(uncond.vector[:, 64:], sizes)
    spoken = hidden("sdxl", "a cat", negative="blurry")[1]
    assert spoken is not None
    assert spoken.any()


def test_the_refiner_reads_aesthetic_scores_6_and_2_5():
    models = tiny("sdxl-refiner")
    cond, uncond = halves(models, SMALL)
    assert uncond is not None
    for half, score in ((cond, 6.0), (uncond, 2.5)):
        assert half.vector is not None
        assert torch.equal(half.vector[:, 64:], size_embedding([24, 32, 0, 0, score], half.vector))


# --- the other families


def test_inpainting_models_see_a_full_mask_and_a_grey_picture():
    for name in ("sd1-inpaint", "sd2-inpaint"):
        models = tiny(name)
        cond, uncond = halves(models, replace(SMALL, batch_size=2))
        assert uncond is not None
        for half in (cond, uncond):
            assert half.concat is not None
            assert half.concat.shape == (2, 5, 3, 4)
            assert bool((half.concat[:, 0] == 1).all())
            assert models.vae is not None
            with torch.no_grad():
                grey = models.vae.encode(torch.zeros(1, 3, 24, 32))
            assert torch.equal(half.concat[:1, 1:], grey)
        assert txt2img(models, SMALL)[0].size == (32, 24)


def test_class_conditional_models_draw_numbers():
    models = tiny("class-f4")
    cond, uncond = halves(models, replace(SMALL, prompt=" 207 "))
    table = models.text[0].weight
    assert isinstance(table, Tensor)
    assert cond.context is not None
    assert torch.equal(cond.context[0, 0], table[207])
    assert uncond is not None  # the last of 1001 classes is "no class"
    assert uncond.context is not None
    assert torch.equal(uncond.context[0, 0], table[1000])
    assert txt2img(models, replace(SMALL, prompt="207"))[0].size == (32, 24)
    assert txt2img(tiny("class-f8"), replace(SMALL, prompt="0"))[0].size == (32, 24)
    for prompt in ("a red apple", "1001", "-1", "²", ""):
        with pytest.raises(PromptError, match="a number below 1001"):
            txt2img(models, replace(SMALL, prompt=prompt))


def test_unconditional_models_draw_without_words():
    models = tiny("unconditional")
    cond, uncond = halves(models, replace(SMALL, cfg_scale=3.0))
    assert (cond.context, cond.vector, cond.concat, uncond) == (None, None, None, None)
    assert txt2img(models, SMALL)[0].size == (32, 24)


def test_text2image_large_reads_words_once_it_has_a_vocabulary(tmp_path):
    models = tiny("text2image-large")
    with pytest.raises(PromptError, match="vocabulary="):
        txt2img(models, SMALL)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple"]))
    assert txt2img(replace(models, tokenizer=WordPiece(vocabulary)), SMALL)[0].size == (32, 24)


def test_a_texture_has_a_size_at_which_its_edges_meet():
    request = Request(width=40, height=64, tiling=True)
    with pytest.raises(RequestError, match="width must be a multiple of 16 for a texture, got 40; try 32"):
        plan(tiny("sd1"), request)
    plan(tiny("sd1"), replace(request, tiling=False))
