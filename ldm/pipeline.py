"""From a request to pictures, in one page.

prompt -> conditioning -> guidance -> sampler -> decoder -> picture. What settles a request is in
ldm/planning.py, what leads its steps in ldm/conditioning.py, what happens to given pictures in ldm/canvas.py.
Nothing imports this module but `ldm` itself and what stands on top of it: copy `sample` and alter it to make
a pipeline of your own.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import hires, masks, networks, soft_inpainting, stepdown, token_merging
from ldm.conditioning import denoisers
from ldm.controlnet import Control
from ldm.families import Concat
from ldm.finite import UNET, finite, second_try
from ldm.images import to_pil, with_text
from ldm.infotext import infotext
from ldm.inputs import NO_INPUTS, Inputs
from ldm.latents import decode, encode
from ldm.models import Models
from ldm.noise import STREAMS, BrownianNoise, Noise, starting_noise
from ldm.planning import Plan, autoencoder, plan
from ldm.request import Request
from ldm.resize import resized
from ldm.samplers import Step
from ldm.seamless import seamless
from ldm.soft_inpainting import Soft


def sample(models: Models, request: Request, inputs: Inputs = NO_INPUTS) -> Iterator[Step]:
    """Run the request, one step at a time; the last step's x is the finished latent (B, C, h, w) float32.

    A second pass follows with steps of its own size, which are counted on.
    LoRA files and hypernetworks that the prompt names change the model until the run ends or is closed: one
    run at a time on the same `models`.
    """
    stepdown.forget(*models.all_parts)
    run = plan(models, request, inputs)
    upscaler = hires.load(models, run)  # now, as a mistyped name shall not cost a whole pass
    with texture(models, run):
        latents = given(models, run)
    step = None
    for step in descend(models, run, latents):
        yield step
    if run.second is not None and step is not None:
        with texture(models, run):
            latents = hires.larger_latents(models, run, step.x, upscaler)
        for following in descend(models, run.second, latents):
            yield following._replace(index=step.index + 1 + following.index)


def descend(models: Models, run: Plan, latents: Tensor | None) -> Iterator[Step]:
    """One way down through the noise levels, from latents (B, C, h, w) or, if None, from noise alone.

    Raises NotFiniteError if it ends in NaN or infinity. Half precision gets a second try: the steps of the
    same run in float32 follow.
    """
    hints = [control.network for control in run.inputs.controls]
    yield from second_try(models, lambda models: _descend(models, run, latents), hints)


def _descend(models: Models, run: Plan, latents: Tensor | None) -> Iterator[Step]:
    with changed(models, run):
        guided = denoisers(models, run)
        at = 0  # the step at hand, by its noise level: some samplers choose their number of steps themselves
        x, noise, keep = start(models, run, latents)
        # DPM adaptive comes there once for each picture of a batch; only the last time counts.
        end = run.sigmas[-2] * (1 + 1e-4) if run.sampler.stops_early else run.sigmas[-1]

        def denoise(x: Tensor, sigma: float) -> Tensor:
            nonlocal at
            if sigma == run.sigmas[0]:  # DPM adaptive begins again for each picture of a batch
                at = 0
            return keep(guided[at](x, sigma), sigma)

        for step in run.sampler(denoise, x, run.sigmas, noise, **run.request.sampler_options()):
            at = min(sum(level > step.sigma_next for level in run.sigmas), len(guided) - 1)
            if step.sigma_next <= end:
                x = finite(keep(run.sampler.finish(step.x, step.sigma_next), 0.0), UNET)
                step = step._replace(x=x)
            yield step


Keep = Callable[[Tensor, float], Tensor]
"""(denoised (B, C, h, w), sigma) -> the same with what a mask keeps put back."""


def start(models: Models, run: Plan, latents: Tensor | None) -> tuple[Tensor, Noise, Keep]:
    """The state in which the run begins (B, C, h, w), the noise for its steps, and what a mask keeps."""
    request, edit = run.request, run.request.edit
    factor = autoencoder(models).config.factor
    first, noise = starting_noise(request, run.latent_shape, factor=factor, device=models.device)
    if run.sampler.brownian:
        noise = BrownianNoise(
            run.latent_shape,
            [request.single(i).seed for i in range(request.batch_size)],
            sigma_min=run.levels[-2],
            sigma_max=run.levels[0],
            device=models.device,
            stream=STREAMS[request.compat.noise],
        )
    if latents is None or edit is None:
        return run.sampler.start(first, run.sigmas[0]), noise, keeper(first, None, None)
    mask = latent_mask(models, run)
    if mask is not None:
        if edit.masked_content == "latent noise":
            latents = torch.lerp(latents, first, mask)
        elif edit.masked_content == "latent nothing":
            latents = latents * (1 - mask)
    x = latents + first * (edit.noise_multiplier * (run.noised + edit.extra_noise))
    if run.noised != run.sigmas[0]:  # taken for a state of that level, of the variance that it should have
        x = x * math.sqrt((1 + run.sigmas[0] ** 2) / (1 + run.noised**2))
    return x, noise, keeper(latents, mask, edit.soft)


def keeper(latents: Tensor, mask: Tensor | None, soft: Soft | None) -> Keep:
    """Puts the given latents (B, C, h, w) back where the mask (1, 1, h, w) is 0; nothing without a mask."""
    if mask is None:
        return lambda denoised, sigma: denoised
    if soft is None:
        return lambda denoised, sigma: torch.lerp(latents, denoised, mask)
    return lambda denoised, sigma: soft_inpainting.blended(soft, latents, denoised, mask, sigma)


def latent_mask(models: Models, run: Plan) -> Tensor | None:
    """The mask (1, 1, h, w), zeros and ones unless inpainting is soft; None: all is drawn anew."""
    if run.canvas is None or run.canvas.mask is None or run.request.edit is None:
        return None
    _, h, w = run.latent_shape
    return masks.latent_mask(run.canvas.mask, w, h, rounded=run.request.edit.soft is None).to(models.device)


@contextmanager
def changed(models: Models, run: Plan) -> Iterator[None]:
    """Within the block the model is as the run wants it; then it is as before."""
    with networks.applied(models, run.networks), texture(models, run), fewer_tokens(models, run):
        yield


def texture(models: Models, run: Plan) -> AbstractContextManager[None]:
    """Within the block, opposite edges of a picture meet if the run shall draw a texture."""
    if not run.request.tiling:
        return nullcontext()
    parts = [models.denoiser.network, models.vae, *(one.network for one in run.inputs.controls)]
    if models.refiner is not None:
        parts.append(models.refiner.denoiser.network)
    return seamless(*(part for part in parts if isinstance(part, nn.Module)))


@contextmanager
def fewer_tokens(models: Models, run: Plan) -> Iterator[None]:
    """Within the block, self-attention merges tokens if the run shall do so."""
    ratio, downsample = run.request.token_merging, run.request.token_merging_downsample
    with ExitStack() as undo:
        for one in (models, models.refiner) if ratio else ():
            if one is not None:
                undo.enter_context(token_merging.merging(one.unet, ratio, run.latent_shape[1:], downsample))
        yield


def given(models: Models, run: Plan) -> Tensor | None:
    """The latents (B, C, h, w) of the given picture; None: the run starts from noise alone."""
    if run.canvas is None or run.request.edit is None:
        return None
    if models.family.concat is Concat.PICTURE and run.strength == 1 and run.canvas.mask is None:
        return None  # InstructPix2Pix sees the picture all the time
    image = run.canvas.start
    if run.request.edit.resize == "latent" and run.canvas.mask is None:
        factor = autoencoder(models).config.factor
        width, height = (max(round(side / factor), 1) * factor for side in image.size)
        z = encode(models, [resized(image, width, height)])
        z = F.interpolate(z, size=run.latent_shape[1:], mode="bilinear")
    else:
        z = encode(models, [image])
    return z.expand(run.request.batch_size, -1, -1, -1)


def picture(models: Models, run: Plan, i: int, latent: Tensor) -> Image.Image:
    """Decode the finished latent (C, h, w) of picture i of a run and write its settings into it."""
    [image] = finished(models, run, [(i, latent)])
    return image


def finished(models: Models, run: Plan, latents: Iterable[tuple[int, Tensor]]) -> Iterator[Image.Image]:
    """The pictures of a run, each with its settings. latents: finished ones (C, h, w), with their places."""
    enlarges = run.request.hires is not None and run.second is None
    upscaler = hires.load(models, run) if enlarges else None
    with texture(models, run):
        change = changed_parts(models, run)
    for i, latent in latents:
        with texture(models, run):
            if enlarges:
                image = hires.larger_picture(models, run, latent, upscaler)
            else:
                x = latent.unsqueeze(0)
                image = to_pil(decode(models, x)[0], truncate=run.request.compat.truncate_8bit)
        if run.canvas is not None:
            image = run.canvas.finished(image, change(latent))
        yield with_text(image, described(models, run, i))


def described(models: Models, run: Plan, place: int = 0) -> str:
    """The settings of the picture at a place of the batch, as it carries them."""
    return infotext(run.settled, models, run.networks.hashes, dict(run.inputs.fields()), place=place)


def changed_parts(models: Models, run: Plan) -> Callable[[Tensor], Tensor | None]:
    """Soft inpainting: tells of a finished latent (C, h, w) how much of each pixel to show, (1, 1, h, w)."""
    soft = run.request.edit and run.request.edit.soft
    mask = latent_mask(models, run) if soft else None
    before = None if mask is None else given(models, run)
    if soft is None or mask is None or before is None:
        return lambda latent: None
    return lambda latent: soft_inpainting.visible(soft, before[:1], latent.unsqueeze(0), mask)


def pictures(models: Models, run: Plan, latents: Tensor) -> list[Image.Image]:
    """All pictures of a run, from its finished latents (B, C, h, w)."""
    return list(finished(models, run, enumerate(latents)))


def txt2img(models: Models, request: Request, inputs: Inputs = NO_INPUTS) -> list[Image.Image]:
    """Draw the pictures of a request. Each carries its settings, also into a PNG that it is saved to.

    inputs: what leads the run beside the prompt, such as `Inputs(controls=...)`.
    """
    last = deque(sample(models, request, inputs), maxlen=1).pop()
    return pictures(models, plan(models, request, inputs), last.x)


def img2img(
    models: Models, request: Request, picture: Image.Image, *, controls: Sequence[Control] = ()
) -> list[Image.Image]:
    """Draw a picture anew, from its own colours and shapes: the more, the higher `request.edit.strength`.

    picture: any mode and size, see `ldm.images.read_picture`; how it is used says `request.edit`.
    """
    return txt2img(models, request, Inputs(picture=picture, controls=tuple(controls)))


def inpaint(
    models: Models,
    request: Request,
    picture: Image.Image,
    mask: Image.Image,
    *,
    controls: Sequence[Control] = (),
) -> list[Image.Image]:
    """Draw anew what is white in the mask, and keep all else to the byte (LdmError otherwise).

    mask: a picture of the same shape; grey counts by its brightness.
    The result has the size of the picture, unless the request names a size: then the picture is first brought
    to that, as `request.edit.resize` says.
    """
    return txt2img(models, request, Inputs(picture=picture, mask=mask, controls=tuple(controls)))
