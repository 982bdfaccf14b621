"""From a request to pictures, in one page.

prompt -> conditioning -> guidance -> sampler -> decoder -> picture. Nothing imports this module but `ldm`
itself: copy `sample` and alter it to make a pipeline of your own.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from ldm import networks, schedules
from ldm.denoise import Conditioning
from ldm.errors import LdmError, RequestError
from ldm.families import Concat, Picture
from ldm.guidance import Guides, cfg, needs_negative
from ldm.images import to_pil
from ldm.infotext import infotext
from ldm.models import Models
from ldm.networks import Networks
from ldm.noise import STREAMS, BrownianNoise, Noise, starting_noise
from ldm.request import Request
from ldm.samplers import Sampler, Step, parse
from ldm.text import editing
from ldm.text.prompt import compose, without_comments
from ldm.vae import AutoencoderKL, VQModel


@dataclass(frozen=True)
class Plan:
    """A request with every open choice settled: what will run."""

    request: Request
    width: int  # pixels
    height: int
    steps: int
    cfg_scale: float
    sampler: Sampler
    spacing: str  # of the noise levels, a name of ldm.spacings.SPACINGS
    sigmas: tuple[float, ...]  # steps + 1 levels, the last one 0 (DDIM as in other programs: see compat)
    latent_shape: tuple[int, int, int]  # (C, h, w)
    prompt: str  # without comments and the tags that name files
    negative_prompt: str  # without comments
    networks: Networks  # the files named

    @property
    def settled(self) -> Request:
        """The request with nothing left open, as it is written into the pictures."""
        return replace(
            self.request,
            width=self.width,
            height=self.height,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            sampler=self.sampler.name,
            schedule=self.spacing,
        )


def plan(models: Models, request: Request) -> Plan:
    """Settle what the request leaves open, from the model's family and the sampler; find the files it names.

    Raises RequestError, PromptError or SamplerError if the request does not fit the model, LdmError if a part
    or a file is missing.
    """
    family, vae = models.family, autoencoder(models)
    if family.parts and not models.text:
        raise LdmError(
            f"{models.name} holds no text encoder; load a whole checkpoint and put this UNet into it: "
            "dataclasses.replace(whole, denoiser=models.denoiser)"
        )
    sampler, spacing = parse(request.sampler or family.sampler, request.schedule)
    spacing = family.spacings.get(spacing, spacing)
    sampler.check_options(request.sampler_options())
    steps = request.steps or family.steps
    sigmas = _sigmas(models, request, sampler, steps, spacing)
    factor = vae.config.factor
    width, height = request.width or models.default_size, request.height or models.default_size
    for name, value in (("width", width), ("height", height)):
        if value % factor:
            near = max(round(value / factor), 1) * factor
            raise RequestError(f"{name} must be a multiple of {factor}, got {value}; try {near}")
    negative_prompt = without_comments(request.negative_prompt)
    prompt, found = networks.find(models, without_comments(request.prompt), negative_prompt)
    return Plan(
        request=request,
        width=width,
        height=height,
        steps=steps,
        cfg_scale=family.cfg_scale if request.cfg_scale is None else request.cfg_scale,
        sampler=sampler,
        spacing=spacing,
        sigmas=tuple(sigmas),
        latent_shape=(vae.config.embed_dim, height // factor, width // factor),
        prompt=prompt,
        negative_prompt=negative_prompt,
        networks=found,
    )


def _sigmas(models: Models, request: Request, sampler: Sampler, steps: int, spacing: str) -> list[float]:
    """The noise levels of the run, as the request's `compat` wants them."""
    schedule, compat = models.denoiser.schedule, request.compat
    if spacing == sampler.spacing == "ddim_uniform" and compat.ddim_levels != "exact":
        return schedules.ddim_levels(schedule, steps, compat.ddim_levels)
    low, high = request.sigma_min, request.sigma_max
    if spacing == "karras" and compat.old_karras_range:
        low, high = low or 0.1, high or 10.0
    return sampler.sigmas(schedule, steps, spacing, sigma_min=low, sigma_max=high, rho=request.rho)


@torch.no_grad()
def conditioning(models: Models, run: Plan) -> list[Guides]:
    """What leads each step of the run: the same object where the prompt does not change.

    Each text is encoded once, by itself. The negative half is None where it is not needed: at cfg_scale 1,
    and for models without conditioning.
    """
    family, request = models.family, run.request
    concat = _grey(models, run) if family.concat is Concat.INPAINT else None

    @cache
    def encode(text: str, negative: bool) -> Conditioning:
        picture = Picture(
            width=run.width,
            height=run.height,
            negative=negative,
            clip_skip=request.clip_skip,
            compat=request.compat,
            embeddings=run.networks.embeddings,
        )
        one = family.condition(models.text, models.tokenizer, text, picture)
        return replace(one, concat=concat).expanded(request.batch_size)

    steps, late = len(run.sigmas) - 1, request.compat.late_first_edit
    parts, weights = zip(*compose(run.prompt), strict=True)
    old = request.compat.old_edit_times
    prompts = [editing.schedule(text, steps, old=old) for text in parts]
    negative = editing.schedule(run.negative_prompt, steps, old=old)
    needed = family.parts and needs_negative(weights, run.cfg_scale)

    @cache
    def guides(texts: tuple[str, ...], away: str) -> Guides:
        found = (encode(text, False) for text in texts)
        return Guides(tuple(zip(found, weights, strict=True)), encode(away, True) if needed else None)

    def text(schedule: editing.Schedule, step: int) -> str:
        return schedule.text(schedule.at(step, late=late))

    return [guides(tuple(text(p, step) for p in prompts), text(negative, step)) for step in range(steps)]


def sample(models: Models, request: Request) -> Iterator[Step]:
    """Run the request, one step at a time; the last step's x is the finished latent (B, C, h, w) float32.

    LoRA files and hypernetworks that the prompt names change the model until the run ends or is closed: one
    run at a time on the same `models`.
    """
    run = plan(models, request)
    with networks.applied(models, run.networks):
        guides = conditioning(models, run)
        by_guides = {id(g): cfg(models.denoiser, g, run.cfg_scale, request.cfg_rescale) for g in guides}
        at = 0  # the step at hand, by its noise level: some samplers choose their number of steps themselves

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return by_guides[id(guides[at])](x, sigma)

        x, noise = start(models, run)
        for step in run.sampler(denoise, x, run.sigmas, noise, **request.sampler_options()):
            at = min(sum(level > step.sigma_next for level in run.sigmas), len(guides) - 1)
            last = step.sigma_next == run.sigmas[-1] > 0
            yield step._replace(x=run.sampler.finish(step.x, step.sigma_next)) if last else step


def start(models: Models, run: Plan) -> tuple[Tensor, Noise]:
    """The state in which the run begins (B, C, h, w), and the noise for the sampler's steps."""
    request = run.request
    factor = autoencoder(models).config.factor
    first, noise = starting_noise(request, run.latent_shape, factor=factor, device=models.device)
    if run.sampler.brownian:
        noise = BrownianNoise(
            run.latent_shape,
            [request.single(i).seed for i in range(request.batch_size)],
            sigma_min=run.sigmas[-2],
            sigma_max=run.sigmas[0],
            device=models.device,
            stream=STREAMS[request.compat.noise],
        )
    return run.sampler.start(first, run.sigmas[0]), noise


def autoencoder(models: Models) -> AutoencoderKL | VQModel:
    """The model's VAE. Raises LdmError if the file held none."""
    if models.vae is None:
        raise LdmError(f"{models.name} holds no autoencoder; give one with vae= (--vae)")
    return models.vae


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pixels (B, 3, H, W) float32, nominally in [-1, 1]. One picture at a time."""
    vae = autoencoder(models)
    return torch.cat([vae.decode(z.unsqueeze(0).float()) for z in latents])


def picture(models: Models, run: Plan, i: int, latent: Tensor) -> Image.Image:
    """Decode the finished latent (C, h, w) of picture i of a run and write its settings into it."""
    text = infotext(run.settled, models, run.networks.hashes, place=i)
    return to_pil(decode(models, latent.unsqueeze(0))[0], text, truncate=run.request.compat.truncate_8bit)


def pictures(models: Models, run: Plan, latents: Tensor) -> list[Image.Image]:
    """All pictures of a run, from its finished latents (B, C, h, w)."""
    return [picture(models, run, i, latent) for i, latent in enumerate(latents)]


def txt2img(models: Models, request: Request) -> list[Image.Image]:
    """Draw the pictures of a request. Each carries its settings, also into a PNG that it is saved to."""
    last = deque(sample(models, request), maxlen=1).pop()
    return pictures(models, plan(models, request), last.x)


def _grey(models: Models, run: Plan) -> Tensor:
    """What an inpainting model sees without a picture: mask 1 everywhere and a grey picture. (1, 5, h, w)."""
    z = autoencoder(models).encode(torch.zeros(1, 3, run.height, run.width, device=models.device))
    return torch.cat([torch.ones_like(z[:, :1]), z], dim=1)
