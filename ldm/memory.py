"""How much memory a run will take, told before anything is loaded, and how to make it fit.

    plan = ldm.plan("v1-5-pruned-emaonly.safetensors", request, budget=4 * 2**30)
    print(plan)  # 3.4 of 4.0 GB: weights in float16 on cpu
    models = plan.load("v1-5-pruned-emaonly.safetensors")

The run is rehearsed (rehearsal.py): the file's networks are built without their weights, called in the order
and in the sizes of the run, and every tensor is counted. docs/memory.md compares this with the truth.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm import hires, hypernetwork, lora, main_memory, offload, planning, tiled_vae
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
from ldm.models import Models
from ldm.planning import Plan, autoencoder
from ldm.rehearsal import META, Ledger, blank, blank_module
from ldm.request import Request
from ldm.t2i_adapter import Adapter
from ldm.text.prompt import compose, without_comments
from ldm.tiles import tiled_strips
from ldm.upscalers import NetworkUpscaler, passes
from ldm.vae import VAEConfig
from ldm.ways import Way, way_of, ways, ways_of

FIXED = 290 * 2**20
"""Bytes of a process that has drawn the smallest picture, without weights: Python, torch, a tokenizer."""

ON_A_CARD = 150 * 2**20
"""The same of a graphics card: scratch memory of its libraries. An estimate, not measured."""

TOKENS = 77  # in a prompt; more of them take little
Controls = Sequence[ControlNet | Adapter]
Run = tuple[Request, Inputs]


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
    blanks: dict[object, tuple[Models, Sequence[ControlNet | Adapter]]] = {}
    least = None
    for way in ways_of(what) if isinstance(what, Models) else ways(str(device), fast=fast):
        held = way.dtype, way.storage
        if held not in blanks:  # files are read once for all ways to hold their weights alike
            if isinstance(what, Models):
                models = blank(what)
            else:
                models = load(what, device=META, dtype=way.dtype, storage=way.storage, **options)
            blanks[held] = models, [load_controlnet(path, models) for path in controls]
        models, named = blanks[held]
        found = found or largest(models, runs(models))
        needs = max(
            predict(models, request, way, inputs, [*_hinted(inputs), *named]) for request, inputs in found
        )
        if needs <= budget:
            return MemoryPlan(way, needs, budget)
        least = min(needs, least or needs)
    raise RequestError(
        f"this needs {(least or 0) / 2**30:.2f} GB of memory at least, there is {budget / 2**30:.2f}; "
        "try a smaller picture or batch"
    )


def _hinted(inputs: Inputs) -> Controls:
    return [blank_module(one.network) for one in inputs.controls]


def largest(models: Models, runs: Iterable[Run]) -> list[Run]:
    """Those runs of which no other one is larger, or as large, in every respect.

    A run that does not fit the models is left out: it says so itself, when its turn comes. If none fits,
    the first one's LdmError is raised.
    """
    kept: list[tuple[object, Sequence[int], Run]] = []
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

    models, controls: as they are held, but without memory for weights (rehearsal.py). Not counted: latent
    diffusion that enlarges pictures. Raises what `ldm.txt2img` raises before its first step.
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
    """Bytes that a run takes beside the weights: while UNet and ControlNets run; while the autoencoder does.

    On a CPU the second ones hold what the heap keeps of the first ones. What the prompt names is among both:
    what LoRA files change is kept, to be restored. Arguments as of `predict`.
    """
    run, last = _passes(models, request, inputs)
    rows = _rows(models, request, run)
    rows = min(rows, way.limits.rows or rows)
    on_cpu = torch.device(way.device).type == "cpu"
    upscaler = _upscaler(models, run, on_cpu)
    files, more = Files.of(run), Files.of(run.second or run)
    ledger = Ledger(torch.device(way.device), fast=way.fast)
    with torch.no_grad(), ledger:
        steps, pixels = [], []
        held = [torch.empty_like(weight) for weight in upscaler.network.parameters()] if upscaler else []
        if inputs.picture is not None or models.family.concat is Concat.INPAINT:
            _encode(models, run, way)
            pixels.append(ledger.turn())
        with files.applied(models, way):
            _step(models, run, rows, controls)
        steps.append(ledger.turn() + on_cpu * files.pages)
        if run.second is not None:
            if run.request.hires and run.request.hires.upscaler not in LATENT_MODES:
                _decode(models, run, way)
                if upscaler is not None:
                    _enlarge(models, upscaler, run)
                _encode(models, run.second, way)
                pixels.append(ledger.turn())
            with more.applied(models, way):
                _step(models, run.second, rows, controls)
            steps.append(ledger.turn() + on_cpu * more.pages)
        _decode(models, last, way)
        if upscaler is not None and run.second is None:
            _enlarge(models, upscaler, run)
        pixels.append(ledger.turn())
        del held
    return max(steps), max(pixels)


@dataclass(frozen=True)
class Files:
    """What a prompt names, read."""

    loras: Sequence[tuple[lora.LoraFile, float, float]]
    hypernetworks: Sequence[tuple[hypernetwork.Hypernetwork, float]]
    pages: int  # bytes of the LoRA files, which stay in main memory while they are applied

    @classmethod
    def of(cls, run: Plan) -> "Files":
        networks = run.networks
        return cls(
            [(lora.read(path), unet, text) for path, unet, text in networks.loras],
            [(hypernetwork.read(path), multiplier) for path, multiplier in networks.hypernetworks],
            sum(path.stat().st_size for path, *_ in networks.loras),
        )

    @contextmanager
    def applied(self, models: Models, way: Way) -> Iterator[None]:
        """Within the block they change the model. What waits beside the device is changed there."""
        loras = self.loras if way.lowvram is None else ()
        with lora.applied(models, loras), hypernetwork.applied(models, self.hypernetworks):
            yield


def _extent(models: Models, request: Request, inputs: Inputs) -> tuple[object, Sequence[int]]:
    """What decides the memory of a run: a kind, and numbers with which it grows."""
    run, last = _passes(models, request, inputs)
    sizes = _rows(models, request, run), run.width, run.height, last.width, last.height
    files = [
        ([(path, bool(unet), bool(text)) for path, unet, text in one.loras], one.hypernetworks)
        for one in (run.networks, run.second and run.second.networks)
        if one
    ]
    upscaler = request.hires and request.hires.upscaler
    return (files, upscaler, inputs.picture is None, inputs.controls), sizes


def _passes(models: Models, request: Request, inputs: Inputs) -> tuple[Plan, Plan]:
    """A run, and what is decoded in the end: of its second pass, or enlarged without one."""
    run, second = planning.plan(models, request, inputs), request.hires
    if second is None or run.second is not None or second.upscaler not in LATENT_MODES:
        return run, run.second or run
    width, height = second.size(run.width, run.height, planning.step_of_sizes(models, request))
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


def _upscaler(models: Models, run: Plan, on_cpu: bool) -> NetworkUpscaler | None:
    """The network that enlarges pictures, without memory for its weights; None: there is none of the kind."""
    upscaler = hires.load(models, run)
    if not isinstance(upscaler, NetworkUpscaler):
        return None
    return upscaler if on_cpu else replace(upscaler, network=upscaler.network.half())


def _enlarge(models: Models, upscaler: NetworkUpscaler, run: Plan) -> None:
    """A picture is enlarged, tile by tile. The network runs once for each size of a tile."""
    network, seen, second = upscaler.network, set[torch.Size](), run.request.hires
    assert second is not None
    width, height = second.target(run.width, run.height, planning.step_of_sizes(models, run.request))

    def tile(pixels: Tensor) -> Tensor:
        b, c, h, w = pixels.shape
        if pixels.shape in seen:
            return torch.empty(b, c, h * network.factor, w * network.factor, device=META)
        seen.add(pixels.shape)
        return network(pixels.to(next(network.parameters()).dtype)).float()

    picture = torch.empty(1, 3, run.height, run.width, device=META)
    for _ in range(passes(network.factor, max(width / run.width, height / run.height))):
        h, w = (side * network.factor for side in picture.shape[2:])
        result = torch.empty(h, w, device=META)  # Pillow holds four bytes for a pixel, too
        for _ in tiled_strips(
            tile, picture, tile=upscaler.tile, overlap=upscaler.overlap, scale=network.factor
        ):
            pass
        picture = torch.empty(1, 3, h, w, device=META)
        del result


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
