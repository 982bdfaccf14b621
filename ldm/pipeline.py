"""From a request to pictures, in one page.

prompt -> conditioning -> guidance -> sampler -> decoder -> picture. Nothing imports this module but `ldm`
itself: copy `sample` and alter it to make a pipeline of your own.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ldm import schedules
from ldm.denoise import Conditioning
from ldm.errors import LdmError, RequestError
from ldm.families import Picture
from ldm.guidance import cfg
from ldm.images import to_pil
from ldm.infotext import infotext
from ldm.models import Models
from ldm.noise import STREAMS, BrownianNoise, starting_noise
from ldm.request import Request
from ldm.samplers import Sampler, Step, parse
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
    """Settle what the request leaves open, from the model's family and the sampler. Costs nothing.

    Raises RequestError or SamplerError if the request does not fit the model, LdmError if a part is missing.
    """
    family, vae = models.family, autoencoder(models)
    if family.needs is not None:
        raise RequestError(
            f"{family.title} needs {family.needs} beside the prompt; this is only text to image"
        )
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
def conditioning(models: Models, run: Plan) -> tuple[Conditioning, Conditioning | None]:
    """The conditional and the unconditional half of guidance, each for the whole batch.

    The second is None where it is not needed: at cfg_scale 1, and for models without conditioning. Each
    prompt is encoded once, by itself.
    """
    family, request = models.family, run.request
    concat = _grey(models, run) if family.grey_concat else None

    def encode(prompt: str, negative: bool) -> Conditioning:
        picture = Picture(width=run.width, height=run.height, negative=negative, clip_skip=request.clip_skip)
        one = family.condition(models.text, models.tokenizer, prompt, picture)
        return replace(one, concat=concat).expanded(request.batch_size)

    positive = encode(request.prompt, False)
    if run.cfg_scale == 1.0 or not family.parts:
        return positive, None
    return positive, encode(request.negative_prompt, True)


def sample(models: Models, request: Request) -> Iterator[Step]:
    """Run the request, one step at a time; the last step's x is the finished latent (B, C, h, w) float32."""
    run = plan(models, request)
    cond, uncond = conditioning(models, run)
    denoise = cfg(models.denoiser, cond, uncond, run.cfg_scale, request.cfg_rescale)

    factor = autoencoder(models).config.factor
    start, noise = starting_noise(request, run.latent_shape, factor=factor, device=models.device)
    x = run.sampler.start(start, run.sigmas[0])
    if run.sampler.brownian:
        noise = BrownianNoise(
            run.latent_shape,
            [request.single(i).seed for i in range(request.batch_size)],
            sigma_min=run.sigmas[-2],
            sigma_max=run.sigmas[0],
            device=models.device,
            stream=STREAMS[request.compat.noise],
        )
    for step in run.sampler(denoise, x, run.sigmas, noise, **request.sampler_options()):
        last = step.sigma_next == run.sigmas[-1] > 0
        yield step._replace(x=run.sampler.finish(step.x, step.sigma_next)) if last else step


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


def pictures(models: Models, run: Plan, latents: Tensor) -> list[Image.Image]:
    """Decode the finished latents (B, C, h, w) of a run and write each picture's settings into it."""
    return [
        to_pil(pixels, infotext(run.settled.single(i), models))
        for i, pixels in enumerate(decode(models, latents))
    ]


def txt2img(models: Models, request: Request) -> list[Image.Image]:
    """Draw the pictures of a request. Each carries its settings, also into a PNG that it is saved to."""
    last = deque(sample(models, request), maxlen=1).pop()
    return pictures(models, plan(models, request), last.x)


def _grey(models: Models, run: Plan) -> Tensor:
    """What an inpainting model sees without a picture: mask 1 everywhere and a grey picture. (1, 5, h, w)."""
    z = autoencoder(models).encode(torch.zeros(1, 3, run.height, run.width, device=models.device))
    return torch.cat([torch.ones_like(z[:, :1]), z], dim=1)
