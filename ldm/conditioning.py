"""What leads each step of a run: prompts, given pictures, hints, and which network listens."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm import faster, masks
from ldm.controlnet import Control, Controlled, prepared
from ldm.denoise import Conditioning, Denoise, Denoiser, Network
from ldm.families import Concat, Picture
from ldm.finite import TEXT, finite
from ldm.guidance import Guides, cfg, needs_negative
from ldm.images import opaque, to_tensor
from ldm.latents import encoded
from ldm.models import Models
from ldm.networks import Networks
from ldm.planning import Plan, autoencoder
from ldm.stepdown import InParts
from ldm.text import editing
from ldm.text.prompt import compose


def denoisers(models: Models, run: Plan) -> list[Denoise]:
    """The guided denoiser of each step: the same object where nothing changes."""
    request, steps = run.request, len(run.sigmas) - 1
    base = conditioning(models, run)
    refiner = models.refiner if run.second is None else None  # of two passes, the last one is refined
    # Embeddings are made for the text encoders of the base model; to the refiner, their names are words.
    refined = conditioning(refiner, replace(run, networks=Networks())) if refiner else base
    base, refined = faster.guided_in_part(run, base), faster.guided_in_part(run, refined)
    ending = refiner and _patient(refiner, refiner.denoiser.network)
    schedule, evaluations = models.denoiser.schedule, faster.Evaluations()
    last = len(schedule.sigmas) - 1

    @cache
    def controlled(active: tuple[int, ...]) -> Denoiser:
        network: Network = models.denoiser.network
        if request.reuse > 1:
            network = faster.Reusing(models.unet, request.reuse, evaluations)
        if active:
            network = Controlled(network, [controls[i] for i in active])
        return _patient(models, network)

    @cache
    def guided(denoiser: Denoiser, guides: Guides, away: Denoiser | None) -> Denoise:
        denoise = cfg(
            denoiser,
            guides,
            run.cfg_scale,
            request.cfg_rescale,
            image_scale=request.image_cfg_scale,
            away=away,
        )
        return evaluations.counted(denoise)

    factor = autoencoder(models).config.factor
    hints = [fitting(one, run) for one in run.inputs.controls]
    controls = [
        prepared(one, models.unet.config, width=run.width, height=run.height, factor=factor) for one in hints
    ]

    def at(step: int) -> Denoise:
        passed = (last - schedule.t(run.sigmas[step])) / (last + 1)
        if ending and passed > request.refiner_switch:
            return guided(ending, refined[step], None)
        active = [i for i, one in enumerate(hints) if one.active(step, steps)]
        both = [i for i in active if hints[i].mode != "control"]
        away = controlled(tuple(both)) if both != active else None
        return guided(controlled(tuple(active)), base[step], away)

    return [at(step) for step in range(steps)]


def _patient(models: Models, network: Network) -> Denoiser:
    """The model's denoiser with this network, which takes a batch in parts where memory does not suffice."""
    patient = InParts(network, models.denoiser.network, models.limits.rows)
    return replace(models.denoiser, network=patient)


def fitting(control: Control, run: Plan) -> Control:
    """A hint of the given picture's shape shows the same scene: it is cut and stretched with the picture."""
    if run.canvas is None or not masks.same_shape(control.hint.size, run.canvas.size):
        return control
    return replace(control, hint=run.canvas.like(control.hint))


@torch.no_grad()
def conditioning(models: Models, run: Plan) -> list[Guides]:
    """What leads each step, by prompts and pictures: the same object where the prompt does not change.

    Each text is encoded once, by itself. The negative half is None where it is not needed: at cfg_scale 1,
    and for models without conditioning.
    """
    family, request = models.family, run.request
    concat = further_channels(models, run)

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
        for states in (one.context, one.vector):
            if states is not None and states.is_floating_point():
                finite(states, TEXT)
        return replace(one, concat=concat).expanded(request.batch_size)

    steps, late = len(run.sigmas) - 1, request.compat.late_first_edit
    parts, weights = zip(*compose(run.prompt), strict=True)

    def read(text: str) -> editing.Schedule:
        return editing.schedule(text, steps, hires_after=run.after, old=request.compat.old_edit_times)

    prompts, negative = [read(text) for text in parts], read(run.negative_prompt)
    edited = family.concat is Concat.PICTURE and request.image_cfg_scale != 1
    needed = family.parts and (edited or needs_negative(weights, run.cfg_scale))

    @cache
    def guides(texts: tuple[str, ...], away: str) -> Guides:
        found = tuple((encode(text, False), weight) for text, weight in zip(texts, weights, strict=True))
        if not needed:
            return Guides(found)
        least = encode(away, True)
        if not edited or least.concat is None:
            return Guides(found, least)
        return Guides(found, least, replace(least, concat=torch.zeros_like(least.concat)))

    def text(schedule: editing.Schedule, step: int) -> str:
        return schedule.text(schedule.at(step, late=late))

    return [guides(tuple(text(p, step) for p in prompts), text(negative, step)) for step in range(steps)]


@torch.no_grad()
def further_channels(models: Models, run: Plan) -> Tensor | None:
    """What the UNet sees beside the noisy latent, (1, C, h, w); None: nothing."""
    match models.family.concat:
        case Concat.INPAINT:
            return _hidden(models, run)
        case Concat.PICTURE:
            # Brooks et al. 2022, section 3.2: the encoded picture, which their code does not scale.
            assert run.canvas is not None
            z = encoded(models, to_tensor(run.canvas.picture, models.device))
            return z / autoencoder(models).config.scale
        case Concat.DEPTH:
            depth = run.inputs.depth
            assert depth is not None
            if run.canvas is not None:
                depth = run.canvas.like(depth)
            return _relative_depth(depth, run.latent_shape[1:]).to(models.device)
        case _:
            return None


def _hidden(models: Models, run: Plan) -> Tensor:
    """For inpainting models: the mask, and the picture with grey behind it, encoded. (1, 1 + C, h, w).

    Without a mask all is repainted, and without a picture it is grey: text to image with such a model.
    """
    size, device = run.latent_shape[1:], models.device
    canvas, edit = run.canvas, run.request.edit
    pixels = torch.zeros(1, 3, run.height, run.width, device=device)
    mask = torch.ones(1, 1, run.height, run.width, device=device)
    if canvas is not None and canvas.mask is not None and edit is not None:
        mask = masks.latent_mask(canvas.mask, run.width, run.height).to(device)
        pixels = to_tensor(canvas.picture, device) * (1 - mask * edit.mask_weight)
    return torch.cat([F.interpolate(mask, size=size), encoded(models, pixels)], dim=1)


def _relative_depth(image: Image.Image, size: Sequence[int]) -> Tensor:
    """A depth picture at the size of the latent (1, 1, h, w), stretched to -1 (far) .. 1 (near)."""
    deep = image.mode.startswith(("I", "F"))  # more than 8 bits, as of a network that estimates depth
    levels = np.array(image if deep else opaque(image).convert("L"), dtype=np.float32)
    depth = torch.from_numpy(levels)[None, None]
    depth = F.interpolate(depth, size=tuple(size), mode="bicubic", align_corners=False)
    low, high = depth.aminmax()
    return 2 * (depth - low) / (high - low).clamp(min=1e-6) - 1
