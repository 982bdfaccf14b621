"""How much memory a run will take, told before anything is loaded, and how to make it fit.

    plan = ldm.plan("v1-5-pruned-emaonly.safetensors", request, budget=4 * 2**30)
    print(plan)  # 3.4 of 4.0 GB: weights in float16 on cpu
    models = plan.load("v1-5-pruned-emaonly.safetensors")

The run is rehearsed (rehearsal.py): the file's networks are built without their weights, called in the order
and in the sizes of the run, and every tensor is counted. docs/memory.md compares this with the truth.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import nn

from ldm import main_memory, offload, planning, tiled_vae
from ldm.checkpoint import load
from ldm.controlnet import Controlled, ControlNet, Prepared
from ldm.controlnet_file import load_controlnet
from ldm.denoise import Network
from ldm.errors import LdmError, RequestError
from ldm.families import Concat
from ldm.guidance import needs_negative
from ldm.hires import LATENT_MODES
from ldm.inputs import NO_INPUTS, Inputs
from ldm.latents import memory as decoding
from ldm.models import Limits, Models
from ldm.optimization import FastConv2d, optimize
from ldm.planning import Plan, autoencoder
from ldm.rehearsal import META, Ledger, blank, blank_module
from ldm.request import Request
from ldm.storage import held_in
from ldm.t2i_adapter import Adapter
from ldm.text.prompt import compose, without_comments
from ldm.vae import VAEConfig

FIXED = 290 * 2**20
"""Bytes of a process that has drawn the smallest picture, without weights: Python, torch, a tokenizer."""

ON_A_CARD = 150 * 2**20
"""The same of a graphics card: scratch memory of its libraries. An estimate, not measured."""

TOKENS = 77  # in a prompt; more of them take little
USUAL = Limits()
Controls = Sequence[ControlNet | Adapter]
Run = tuple[Request, Inputs]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to hold a model and to run it."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    storage: torch.dtype | None = None
    fast: bool = False  # with ldm.optimize, on a CPU
    lowvram: Literal["parts", "blocks"] | None = None  # see ldm.offload
    limits: Limits = USUAL

    def load(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Models:
        """Load a model to be held and run like that. options: further ones of `ldm.load`."""
        home = "cpu" if self.lowvram else self.device
        models = load(path, device=home, dtype=self.dtype, storage=self.storage, **options)
        models = replace(models, limits=self.limits)
        if self.fast:
            optimize(models)
        return (
            offload.offloaded(models, self.device, blocks=self.lowvram == "blocks")
            if self.lowvram
            else models
        )

    def __str__(self) -> str:
        dtype, storage = (str(d).removeprefix("torch.") for d in (self.dtype, self.storage))
        held = {None: "held whole", "parts": "part by part", "blocks": "block by block"}[self.lowvram]
        facts = [
            f"weights in {storage if self.storage else dtype} on {self.device}",
            *([held] if self.lowvram else []),
            *(["made faster"] if self.fast else []),
            *([] if self.limits.whole else ["decoding in strips"]),
            *([] if self.limits.rows is None else [f"UNet batch of {self.limits.rows}"]),
        ]
        return ", ".join(facts)


@dataclass(frozen=True)
class MemoryPlan:
    """How to run within a budget; as text, one line."""

    way: Way
    needs: int  # bytes on the device, at most; on a CPU, of the whole process
    budget: int

    def load(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Models:
        """See `Way.load`."""
        return self.way.load(path, **options)

    def __str__(self) -> str:
        return f"{self.needs / 2**30:.1f} of {self.budget / 2**30:.1f} GB: {self.way}"


def plan(
    what: Models | str | os.PathLike[str] | None,
    request: Request,
    inputs: Inputs = NO_INPUTS,
    *,
    budget: int | None = None,
    device: torch.device | str = "cpu",
    fast: bool = False,
    controls: Sequence[str | os.PathLike[str]] = (),
    **options: Any,
) -> MemoryPlan:
    """The fastest way to make a run that fits the memory. None changes the picture by more than rounding.

    what: a checkpoint, which is not loaded for this; None: the embedded model. Of loaded models, only the
        limits are left to choose: run `dataclasses.replace(models, limits=plan.way.limits)`.
    budget: bytes; None: what is free on the device.
    device, fast: of models to be loaded; fast: with ldm.optimize, if there is memory for it.
    controls: files of ControlNets that will be loaded, beside those of `inputs`.
    options: further ones of `ldm.load`, such as vae.

    Raises RequestError if there is no way, with the least that is needed; also what `ldm.load` and
    `ldm.txt2img` raise.
    """
    return plan_all(
        what,
        lambda _: [(request, inputs)],
        budget=budget,
        device=device,
        fast=fast,
        controls=controls,
        **options,
    )


def plan_all(
    what: Models | str | os.PathLike[str] | None,
    runs: Callable[[Models], Iterable[Run]],
    *,
    budget: int | None = None,
    device: torch.device | str = "cpu",
    fast: bool = False,
    controls: Sequence[str | os.PathLike[str]] = (),
    **options: Any,
) -> MemoryPlan:
    """The same for several runs, one after another: each must fit.

    runs: what they are, told the models without weights, as sizes may depend on them.
    """
    device = what.device if isinstance(what, Models) else torch.device(device)
    budget = free(device) if budget is None else budget
    found: list[Run] = []
    least = None
    for way in ways_of(what) if isinstance(what, Models) else ways(str(device), fast=fast):
        if isinstance(what, Models):
            models = blank(what)
        else:
            models = load(what, device=META, dtype=way.dtype, storage=way.storage, **options)
        found = found or largest(models, runs(models))
        named = [load_controlnet(path, models) for path in controls]
        needs = max(
            predict(models, request, way, inputs, [*_hinted(inputs), *named]) for request, inputs in found
        )
        if needs <= budget:
            return MemoryPlan(way, needs, budget)
        least = min(needs, least or needs)
    raise RequestError(
        f"this needs {(least or 0) / 2**30:.1f} GB of memory at least, there is {budget / 2**30:.1f}; "
        "try a smaller picture or batch"
    )


def _hinted(inputs: Inputs) -> Controls:
    return [blank_module(one.network) for one in inputs.controls]


def largest(models: Models, runs: Iterable[Run]) -> list[Run]:
    """Those runs of which no other one is larger, or as large, in every respect.

    A run that does not fit the models is left out: it says so itself, when its turn comes. If none fits,
    the first one's LdmError is raised.
    """
    kept: list[tuple[Hashable, Sequence[int], Run]] = []
    failed: LdmError | None = None
    for request, inputs in runs:
        try:
            kind, sizes = _extent(models, request, inputs)
        except LdmError as error:
            failed = failed or error
            continue
        if not any(kind == other and _within(sizes, more) for other, more, _ in kept):
            kept = [one for one in kept if one[0] != kind or not _within(one[1], sizes)]
            kept.append((kind, sizes, (request, inputs)))
    if not kept:
        raise failed or RequestError("there is nothing to draw")
    return [run for _, _, run in kept]


def _within(sizes: Sequence[int], more: Sequence[int]) -> bool:
    return all(one <= other for one, other in zip(sizes, more, strict=True))


def ways(device: str, *, fast: bool = False) -> Iterator[Way]:
    """To load a model, from the fastest way to the one that takes least memory."""
    half = Way(device=device, dtype=torch.float16)
    held = (
        [*([Way(fast=True)] if fast else []), Way(), Way(storage=torch.float16)]
        if device == "cpu"
        else [half, replace(half, lowvram="parts"), replace(half, lowvram="blocks")]
    )
    for way, limits in product(held, _limits()):
        yield replace(way, limits=limits)


def ways_of(models: Models) -> Iterator[Way]:
    """To run loaded models, in that order, too."""
    for limits in _limits():
        yield replace(way_of(models), limits=limits)


def way_of(models: Models) -> Way:
    """How they are held, and run."""
    blocks = offload.in_blocks(models.unet)
    return Way(
        device=str(models.device),
        dtype=models.denoiser.dtype,
        storage=held_in(models.unet),
        fast=any(isinstance(layer, FastConv2d) for layer in models.unet.modules()),
        lowvram=("blocks" if blocks else "parts") if offload.is_offloaded(models.unet) else None,
        limits=models.limits,
    )


def _limits() -> Iterator[Limits]:
    for whole, rows in product((USUAL.whole, 0), (None, 1)):
        yield Limits(rows, whole)


def free(device: torch.device) -> int:
    """Bytes that a process may have; on a CPU, what this process has already is among them.

    Raises RequestError where the system does not tell.
    """
    if device.type == "cuda":
        with suppress(RuntimeError, AssertionError):  # no card, or torch without CUDA
            return torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and (found := main_memory.free()) is not None:
        return found + main_memory.resident()
    raise RequestError(f"how much memory is free on {device} is not known here; give a budget")


def predict(
    models: Models, request: Request, way: Way, inputs: Inputs = NO_INPUTS, controls: Controls = ()
) -> int:
    """Bytes that a run takes at most on its device, weights included.

    models, controls: as they are held, but without memory for weights (rehearsal.py). Not counted: LoRA files
    and networks that enlarge pictures. Raises what `ldm.planning.plan` raises.
    """
    steps, pixels = working(models, request, way, inputs, controls)
    networks = [*controls, *(network for one in _each(models) for network in (*one.text, one.unet))]
    blocks = way.lowvram == "blocks"
    sizes = [_bytes(unit) for network in networks for unit in offload.units(network, blocks=blocks)]
    vae = _bytes(autoencoder(models))
    fixed = FIXED if torch.device(way.device).type == "cpu" else ON_A_CARD
    if way.lowvram is not None:
        return fixed + max(max(sizes) + steps, vae + pixels)
    # When the last weight is read, its pages of the file count, too.
    last = max(w.nbytes for network in networks for w in network.parameters())
    return fixed + sum(sizes) + vae + max(steps, pixels, last)


def needed(models: Models, request: Request, inputs: Inputs = NO_INPUTS) -> int:
    """The same of models as they are loaded, and not changed by this."""
    return predict(blank(models), request, way_of(models), inputs, _hinted(inputs))


def working(
    models: Models, request: Request, way: Way, inputs: Inputs = NO_INPUTS, controls: Controls = ()
) -> tuple[int, int]:
    """Bytes that networks take while they run, beside weights: UNet and ControlNets; the autoencoder.

    On a CPU the second ones hold what the heap keeps of the first ones. Arguments as of `predict`.
    """
    hires, (run, last) = request.hires, _passes(models, request, inputs)
    rows = _rows(models, request, run)
    rows = min(rows, way.limits.rows or rows)
    ledger = Ledger(torch.device(way.device), fast=way.fast)
    with torch.no_grad(), ledger:
        steps, pixels = [], []
        if inputs.picture is not None or models.family.concat is Concat.INPAINT:
            _encode(models, run, way)
            pixels.append(ledger.turn())
        _step(models, run, rows, controls)
        steps.append(ledger.turn())
        if run.second is not None:
            if hires and hires.upscaler not in LATENT_MODES:
                _decode(models, run, way)
                _encode(models, run.second, way)
                pixels.append(ledger.turn())
            _step(models, run.second, rows, controls)
            steps.append(ledger.turn())
        _decode(models, last, way)
        pixels.append(ledger.turn())
    return max(steps), max(pixels)


def _extent(models: Models, request: Request, inputs: Inputs) -> tuple[Hashable, Sequence[int]]:
    """What decides the memory of a run: a kind, and numbers with which it grows."""
    run, last = _passes(models, request, inputs)
    sizes = _rows(models, request, run), run.width, run.height, last.width, last.height
    return (request.hires and request.hires.upscaler, inputs.picture is None, inputs.controls), sizes


def _passes(models: Models, request: Request, inputs: Inputs) -> tuple[Plan, Plan]:
    """A run, and what is decoded in the end: of its second pass, or enlarged without one."""
    hires = request.hires and replace(request.hires, prompt="", negative_prompt="")
    # What the words name need not be there yet.
    run = planning.plan(models, replace(request, prompt="", negative_prompt="", hires=hires), inputs)
    if hires is None or run.second is not None or hires.upscaler not in LATENT_MODES:
        return run, run.second or run
    width, height = hires.size(run.width, run.height, planning.step_of_sizes(models, request))
    factor = autoencoder(models).config.factor
    shape = (run.latent_shape[0], height // factor, width // factor)
    return run, replace(run, width=width, height=height, latent_shape=shape)


def _step(models: Models, run: Plan, rows: int, controls: Controls) -> None:
    """All networks of a run see a batch, twice: what stays of the first time is in the way of the second."""
    for one in _each(models):
        unet, (h, w) = one.unet, run.latent_shape[1:]
        config, dtype = unet.config, one.denoiser.dtype
        x = torch.empty(rows, config.in_channels, h, w, dtype=dtype, device=META)
        t = torch.empty(rows, device=META)
        context = y = None
        if config.context_dim is not None:
            context = torch.empty(rows, TOKENS, config.context_dim, dtype=dtype, device=META)
        if config.vector_dim is not None:
            y = torch.empty(rows, config.vector_dim, dtype=dtype, device=META)
        elif config.num_classes is not None:
            y = torch.empty(rows, dtype=torch.int64, device=META)
        network: Network = unet
        if one is models:
            hint = torch.empty(1, 3, run.height, run.width, dtype=dtype, device=META)
            nets = [net for net in controls if isinstance(net, ControlNet)]  # adapters have run before
            prepared = [Prepared(net, net.features(hint), (1.0,) * (len(net.skips) + 1)) for net in nets]
            network = Controlled(unet, prepared)
        for _ in range(2):
            network(x, t, context, y)


def _decode(models: Models, run: Plan, way: Way) -> None:
    vae, latent = autoencoder(models), torch.empty(1, *run.latent_shape, device=META)
    if _in_strips(vae.config, run, way):
        tiled_vae.decode(vae, latent)
    else:
        vae.decode(latent)


def _encode(models: Models, run: Plan, way: Way) -> None:
    vae, pixels = autoencoder(models), torch.empty(1, 3, run.height, run.width, device=META)
    if _in_strips(vae.config, run, way):
        tiled_vae.encode(vae, pixels)
    else:
        vae.encode(pixels)


def _in_strips(config: VAEConfig, run: Plan, way: Way) -> bool:
    return decoding(config, run.width * run.height) > way.limits.whole


def _rows(models: Models, request: Request, run: Plan) -> int:
    """Of a batch that the UNet sees at each step, see `ldm.conditioning`."""
    weights = [weight for _, weight in compose(without_comments(request.prompt))]
    edited = models.family.concat is Concat.PICTURE and request.image_cfg_scale != 1
    negative = bool(models.family.parts) and (edited or needs_negative(weights, run.cfg_scale))
    return request.batch_size * (len(weights) + negative + (negative and edited))


def _each(models: Models) -> Iterator[Models]:
    """A model, and the refiner that ends its runs."""
    yield models
    if models.refiner is not None:
        yield models.refiner


def _bytes(module: nn.Module) -> int:
    return sum(w.nbytes for w in module.parameters())
