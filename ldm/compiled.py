"""The UNet as one compiled graph, for graphics cards: `--fast`.

    models = fast(ldm.load("sd_xl_base_1.0.safetensors", device="cuda"))

What is compiled is only the network, in place: names and weights stay, LoRA files are merged into the same
tensors, and samplers, guidance and previews are as ever. One graph serves all steps of a run, since a noise
level reaches it as a tensor. Another size, batch or length of prompt is another graph, made when it first
comes up; that takes about a minute, so it pays for many pictures of one kind.
"""

import logging
import time
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from ldm.errors import RequestError
from ldm.families import Picture
from ldm.models import Models
from ldm.offload import is_offloaded
from ldm.planning import autoencoder

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

GRAPHS = 32
"""Graphs of one network at most. torch's own limit is 8; beyond it, nothing more is compiled."""

logger = logging.getLogger(__name__)


def fast(
    models: Models,
    *,
    backend: str = "inductor",
    mode: Mode | None = "reduce-overhead",
    sizes: Iterable[tuple[int, int, int]] = (),
) -> Models:
    """The same models, prepared in place to be fast on a graphics card.

    Channels-last convolutions, cuDNN's algorithms chosen by trial, and the UNet compiled to one graph.
    backend, mode: of torch.compile. "reduce-overhead" replays the whole graph (CUDA graphs), which counts
        where batches are small. None: for backends without modes.
    sizes: (width, height, rows), in pixels and pictures of a batch, a guided one counting twice: compile for
        these now, and tell how long it took. Others follow when they come up.
    Raises RequestError for models that are offloaded: their weights are somewhere else at each step.
    """
    if is_offloaded(models.unet):
        raise RequestError("a compiled model stays on its device; choose either --fast or --lowvram")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch.backends.cudnn.benchmark = True
    for one in (models, models.refiner):
        if one is not None:
            for part in (one.unet, one.vae):
                if isinstance(part, nn.Module):
                    part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            one.unet.compile(backend=backend, mode=mode, fullgraph=True, dynamic=False)
    for width, height, rows in sizes:
        begin = time.perf_counter()
        _warm_up(models, width, height, rows)
        seconds = time.perf_counter() - begin
        logger.warning(f"compiled in {seconds:.0f} s for {rows} x {width}x{height} pixels at once")
    return models


@torch.no_grad()
def _warm_up(models: Models, width: int, height: int, rows: int) -> None:
    """Run the UNet as a run does, with an empty prompt, until its graph is recorded."""
    factor, device, dtype = autoencoder(models).config.factor, models.device, models.denoiser.dtype
    picture = Picture(width=width, height=height, negative=True, clip_skip=None)
    empty = models.family.condition(models.text, models.tokenizer, "", picture)
    context, vector = (
        None if one is None else one.expand(rows, *one.shape[1:]).contiguous()
        for one in (empty.context, empty.vector)
    )
    channels = models.unet.config.in_channels
    x = torch.zeros(rows, channels, height // factor, width // factor, device=device, dtype=dtype)
    for _ in range(3):  # CUDA graphs: to compile, to warm up, to record
        models.unet(x, torch.zeros(rows, device=device), context, vector, None, None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
