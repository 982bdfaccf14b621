"""Settling a request: every choice it leaves open is made before anything is computed."""

from dataclasses import dataclass, replace
from functools import cached_property

from ldm import faster, networks, schedules
from ldm.canvas import Canvas, canvas, fitted
from ldm.edit import Edit
from ldm.errors import LdmError, RequestError
from ldm.families.family import Concat
from ldm.inputs import NO_INPUTS, Inputs
from ldm.models import Models
from ldm.networks import Networks
from ldm.request import Request
from ldm.samplers import Sampler, parse
from ldm.text.prompt import without_comments
from ldm.vae import AutoencoderKL, VQModel


@dataclass(frozen=True)
class Plan:
    """A request with every open choice settled: what will run."""

    request: Request
    inputs: Inputs
    width: int  # pixels
    height: int
    steps: int  # as they were asked for; image to image makes a part of them
    cfg_scale: float
    strength: float | None  # of image to image; None: the run starts from noise
    sampler: Sampler
    spacing: str  # of the noise levels, a name of ldm.spacings.SPACINGS
    levels: tuple[float, ...]  # of the whole schedule
    sigmas: tuple[float, ...]  # those visited, the last one 0 (DDIM as in other programs: see compat)
    noised: float  # the level to which a given picture is noised, see _visited
    latent_shape: tuple[int, int, int]  # (C, h, w)
    prompt: str  # without comments and the tags that name files
    negative_prompt: str  # without comments
    networks: Networks  # the files named
    second: "Plan | None" = None  # the larger pass that follows
    after: int | None = None  # this is such a second pass, after a first one of so many steps

    @property
    def steps_made(self) -> int:
        """How many steps will run, those of the second pass included."""
        return len(self.sigmas) - 1 + (self.second.steps_made if self.second else 0)

    @cached_property
    def canvas(self) -> Canvas | None:
        """The given picture and mask, prepared. Raises RequestError if nothing is masked."""
        if self.inputs.picture is None or self.request.edit is None:
            return None
        return canvas(self.inputs, self.request.edit, self.width, self.height, keep_size=self._keep_size)

    @property
    def _keep_size(self) -> bool:
        request = self.request
        named = request.width is not None or request.height is not None
        return not named or (request.edit is not None and request.edit.keep_size)

    @property
    def settled(self) -> Request:
        """The request with nothing left open, as it is written into the pictures."""
        edit, picture = self.request.edit, self.inputs.picture
        if edit is not None:
            other = picture is not None and picture.size != (self.width, self.height)
            keep_size = other and self.inputs.mask is not None and not edit.only_masked and self._keep_size
            edit = replace(edit, strength=self.strength, keep_size=keep_size)
        return replace(
            self.request,
            width=self.width,
            height=self.height,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            sampler=self.sampler.name,
            schedule=self.spacing,
            edit=edit,
        )


def plan(models: Models, request: Request, inputs: Inputs = NO_INPUTS) -> Plan:
    """Settle what the request leaves open, from the model's family, the sampler and the given picture.

    Raises RequestError, PromptError or SamplerError if the request does not fit the model, LdmError if a part
    or a file is missing.
    """
    family = models.family
    if family.parts and not models.text:
        raise LdmError(
            f"{models.name} holds no text encoder; load a whole checkpoint and put this UNet into it: "
            "dataclasses.replace(whole, denoiser=models.denoiser)"
        )
    if inputs.picture is not None and request.edit is None:
        request = replace(request, edit=Edit())
    _check_inputs(models, request, inputs)
    width, height = _size(models, request, inputs, step_of_sizes(models, request))
    replace(request, width=width, height=height)  # raises for sides that no run has: of a very thin picture
    run = _pass(models, request, inputs, width, height)
    if request.hires is None:
        return run
    hires = request.hires
    width, height = hires.size(run.width, run.height, step_of_sizes(models, request))
    second = replace(
        request,
        prompt=hires.prompt or request.prompt,
        negative_prompt=hires.negative_prompt or request.negative_prompt,
        steps=hires.steps or run.steps,
        sampler=hires.sampler or run.sampler.name,
        schedule=hires.schedule or (None if hires.sampler else run.spacing),
        cfg_scale=run.cfg_scale if hires.cfg_scale is None else hires.cfg_scale,
        token_merging=request.token_merging if hires.token_merging is None else hires.token_merging,
        edit=Edit(strength=hires.strength or None),
        seed_resize_from=None,
        hires=None,
        compat=replace(request.compat, strength="exact"),
    )
    if hires.strength == 0:
        return run
    following = _pass(models, second, replace(inputs, picture=None), width, height)
    return replace(run, second=replace(following, after=run.steps))


def _pass(models: Models, request: Request, inputs: Inputs, width: int, height: int) -> Plan:
    """One way down through the noise levels."""
    family, vae = models.family, autoencoder(models)
    sampler, spacing = parse(request.sampler or family.sampler, request.schedule)
    spacing = family.spacings.get(spacing, spacing)
    sampler.check_options(request.sampler_options())
    faster.check(models, request, sampler)
    steps = request.steps or family.steps
    strength = None if request.edit is None else request.edit.strength or family.strength
    total, made = (
        schedules.part_of_run(steps, strength, request.compat.strength) if strength else (steps, None)
    )
    try:
        levels = _levels(models, request, sampler, total, spacing)
    except RequestError as error:
        if total == steps:
            raise
        raise RequestError(
            f"exactly {steps} steps at strength {strength:g} are the last of {total}, too many: {error}"
        ) from None
    sigmas, noised = (levels, levels[0]) if made is None else _visited(levels, made, request)
    negative_prompt = without_comments(request.negative_prompt)
    prompt, found = networks.find(models, without_comments(request.prompt), negative_prompt)
    factor = vae.config.factor
    return Plan(
        request=request,
        inputs=inputs,
        width=width,
        height=height,
        steps=steps,
        cfg_scale=family.cfg_scale if request.cfg_scale is None else request.cfg_scale,
        strength=strength,
        sampler=sampler,
        spacing=spacing,
        levels=levels,
        sigmas=sigmas,
        noised=noised,
        latent_shape=(vae.config.embed_dim, height // factor, width // factor),
        prompt=prompt,
        negative_prompt=negative_prompt,
        networks=found,
    )


def _check_inputs(models: Models, request: Request, inputs: Inputs) -> None:
    family = models.family
    if request.edit is not None and inputs.picture is None:
        raise RequestError("this request is for a given picture, and there is none; see ldm.img2img")
    given = {Concat.PICTURE: inputs.picture, Concat.DEPTH: inputs.depth, Concat.LOW_RES: None}
    if family.concat in given and given[family.concat] is None:
        where = "scripts/upscale.py" if family.concat is Concat.LOW_RES else "ldm.img2img"
        raise RequestError(
            f"{family.title} needs {family.concat.value} beside the prompt, not text alone; see {where}"
        )
    if inputs.depth is not None and family.concat is not Concat.DEPTH:
        raise RequestError(f"{family.title} takes no depth picture; a depth ControlNet does")


def step_of_sizes(models: Models, request: Request) -> int:
    """What widths and heights are multiples of, in pixels.

    The edges of a texture meet only where every level of the UNet has whole pixels, too.
    """
    return autoencoder(models).config.factor * (models.unet.config.factor if request.tiling else 1)


def _size(models: Models, request: Request, inputs: Inputs, multiple: int) -> tuple[int, int]:
    """Width and height of the (first) pass."""
    usual, picture = models.default_size, inputs.picture
    if request.edit is not None and inputs.mask is not None and request.edit.only_masked:
        picture = None  # the part that is drawn has a shape of its own
    width, height = request.width, request.height
    if picture is not None and not (width and height):
        if not width and not height:
            return fitted(picture, usual, multiple)
        share = (width or 0) / picture.width or (height or 0) / picture.height
        width = width or max(round(picture.width * share / multiple), 1) * multiple
        height = height or max(round(picture.height * share / multiple), 1) * multiple
    width, height = width or usual, height or usual
    for name, value in (("width", width), ("height", height)):
        if value % multiple:
            near = max(round(value / multiple), 1) * multiple
            why = " for a texture" if request.tiling else ""
            raise RequestError(f"{name} must be a multiple of {multiple}{why}, got {value}; try {near}")
    return width, height


def _levels(
    models: Models, request: Request, sampler: Sampler, steps: int, spacing: str
) -> tuple[float, ...]:
    """The noise levels of a whole run, as the request's `compat` wants them."""
    schedule, compat = models.denoiser.schedule, request.compat
    if spacing == sampler.spacing == "ddim_uniform" and compat.ddim_levels != "exact":
        levels = tuple(schedules.ddim_levels(schedule, steps, compat.ddim_levels))
        if len(levels) < 2:
            raise RequestError(
                f"{sampler.name} of the web UI makes a step less than asked for; ask for 2 or more"
            )
        return levels
    low, high = request.sigma_min, request.sigma_max
    if spacing == "karras" and compat.old_karras_range:
        low, high = low or 0.1, high or 10.0
    return tuple(sampler.sigmas(schedule, steps, spacing, sigma_min=low, sigma_max=high, rho=request.rho))


def _visited(levels: tuple[float, ...], made: int, request: Request) -> tuple[tuple[float, ...], float]:
    """Image to image: the last levels, for so many steps, and the one to which the picture is noised.

    That is the first of them. DDIM and PLMS of other programs, whose `levels` end above 0, take the level
    before it, though (CompVis); the web UI's then make two steps less than its other samplers.
    """
    old = levels[-1] > 0
    if old and request.compat.ddim_levels == "webui":
        made = max(made - 2, 1)
    first = max(len(levels) - made - 1, 0)
    return levels[first:], levels[max(first - old, 0)]


def autoencoder(models: Models) -> AutoencoderKL | VQModel:
    """The model's VAE. Raises LdmError if the file held none."""
    if models.vae is None:
        raise LdmError(f"{models.name} holds no autoencoder; give one with vae= (--vae)")
    return models.vae
