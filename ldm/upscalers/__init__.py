"""Upscalers: small pictures into large ones, by filters, ESRGAN networks and latent diffusion.

    upscaler = load_upscaler("RealESRGAN_x4plus.pth")
    large = upscaler(image)                             # 4 times as large, RGB
    wall = enlarged(image, upscaler, 1920, 1080)        # any size, transparency kept

What a file holds decides what is built of it, never its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.building import Destination, build, shapes_of
from ldm.checkpoint import load, named
from ldm.errors import CheckpointError, LdmError, RequestError
from ldm.families.family import UNET, strip
from ldm.formats import read
from ldm.formats.mapped import printable
from ldm.library import NO_LIBRARY, Library
from ldm.upscalers.compact import CompactNet, compact_config
from ldm.upscalers.esrgan import RRDBNet, renamed, rrdb_config
from ldm.upscalers.latent import LatentUpscaler
from ldm.upscalers.ldsr import LDSR
from ldm.upscalers.upscaler import Filter, Network, NetworkUpscaler, Progress, Upscaler, interpolated
from ldm.upscalers.x4 import X4Upscaler

__all__ = [
    "DEFAULT",
    "UPSCALERS",
    "Filter",
    "NetworkUpscaler",
    "Upscaler",
    "enlarged",
    "interpolated",
    "load_latent",
    "load_network",
    "load_upscaler",
    "passes",
    "upscaler_named",
]

FILTERS = {
    "None": Filter("None", Image.Resampling.LANCZOS, 1),
    "Nearest": Filter("Nearest", Image.Resampling.NEAREST),
    "Lanczos": Filter("Lanczos", Image.Resampling.LANCZOS),
}
EMBEDDED = {"R-ESRGAN AnimeVideo": Path(__file__).parent / "animevideov3.safetensors"}
DEFAULT = "R-ESRGAN AnimeVideo"
UPSCALERS = (*FILTERS, *EMBEDDED)
"""The names of those that need no file of the user."""

WEB_UI = {
    "R-ESRGAN 4x+": "RealESRGAN_x4plus",
    "R-ESRGAN 4x+ Anime6B": "RealESRGAN_x4plus_anime_6B",
    "R-ESRGAN 2x+": "RealESRGAN_x2plus",
    "R-ESRGAN General 4xV3": "realesr-general-x4v3",
    "R-ESRGAN General WDN 4xV3": "realesr-general-wdn-x4v3",
}
"""The names in the web UI's pictures, and what the published files are called, without ending."""


class Kind(NamedTuple):
    """A kind of network that reads and draws RGB pictures."""

    name: str
    found_by: str  # the name of a weight that no other kind has
    config: Callable[[Mapping[str, tuple[int, ...]]], Any]  # from shapes; CheckpointError if they are strange
    network: Callable[[Any], Network]  # from that configuration


KINDS = (
    Kind("ESRGAN", "body.0.rdb1.conv1.weight", rrdb_config, RRDBNet),
    Kind("SRVGGNetCompact", "body.0.weight", compact_config, CompactNet),
)

NESTED = ("params_ema.", "params.", "module.")  # where published files keep their weights; averages first

OTHERS = {
    "stylegan_decoder.": "GFPGAN, which restores faces",
    "relative_position_bias_table": "SwinIR or one of its kin",
    "attn.temperature": "Restormer or DAT",
    "m_head.": "ScuNET or DPIR",
    "block_1.c1_r.": "SPAN",
    "encoder.blocks.": "CodeFormer, which restores faces",
}
"""(part of a weight's name): what else such files may hold, to tell the user."""

MAX_PASSES = 3  # of an upscaler over its own result, as in the web UI


def load_upscaler(
    name_or_path: str | os.PathLike[str],
    library: Library = NO_LIBRARY,
    *,
    device: torch.device | str = "cpu",
    tile: int | None = None,
    overlap: int | None = None,
) -> Upscaler:
    """An upscaler from a file, or by a name that `upscaler_named` knows.

    device: where a network runs; on CUDA in float16, else in float32.
    tile, overlap: in pixels of the picture to enlarge, 192 and 8 if not said (LDSR: 128 and 64); tile 0: the
        whole picture at once.
    Raises CheckpointError if the file is damaged or no known upscaler, LdmError for an unknown name.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and not path.is_file():
        return upscaler_named(name_or_path, library, device=device, tile=tile, overlap=overlap)
    return _tiled(_from_file(path, path.stem, torch.device(device)), tile, overlap)


def upscaler_named(
    name: str,
    library: Library = NO_LIBRARY,
    *,
    device: torch.device | str = "cpu",
    tile: int | None = None,
    overlap: int | None = None,
) -> Upscaler:
    """An upscaler by its name: one of UPSCALERS, a file's in `library.upscalers`, or the web UI's for that.

    Never a path, so that names in settings of unknown origin lead to no other file.
    """
    if name in FILTERS:
        return FILTERS[name]
    if name not in EMBEDDED and library.upscalers is None:
        known = ", ".join(UPSCALERS)
        raise LdmError(f"there is no upscaler '{printable(name)}'; choose from {known}, or give a file")
    path = EMBEDDED.get(name) or library.upscaler(WEB_UI.get(name, name))
    return _tiled(_from_file(path, name, torch.device(device)), tile, overlap)


def load_network(weights: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Network:
    """The network that these weights make, in float16 on CUDA, else in float32.

    Raises CheckpointError if they make none that is known here, or are incomplete.
    """
    device = torch.device(device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    for prefix in NESTED:
        weights = strip(weights, prefix) or weights
    weights = renamed(weights)
    shapes = shapes_of(weights)
    for kind in KINDS:
        if kind.found_by in weights:
            return build(
                partial(kind.network, kind.config(shapes)), weights, kind.name, Destination(device, dtype)
            )
    known = ", ".join(kind.name for kind in KINDS) + ", LDSR"
    for part, what in OTHERS.items():
        if any(part in name for name in weights):
            raise CheckpointError(f"it looks like {what}; known are {known}")
    raise CheckpointError(f"it is no upscaler that is known here: {known}")


def load_latent(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LatentUpscaler:
    """LDSR or the Stable Diffusion x4 upscaler, from the published checkpoint.

    The averaged weights (EMA) are taken where the file holds them, as the original of LDSR does.
    Raises CheckpointError if the file is damaged or another model's.
    """
    averaged = any(name.startswith("model_ema.") for name in read(path).tensors)
    models = load(path, device=device, ema=averaged)
    for kind in (LDSR, X4Upscaler):
        if models.family is kind.family:
            return kind(models)
    raise CheckpointError(f"{models.name} is {models.family.title}, which enlarges no pictures")


def enlarged(
    image: Image.Image, upscaler: Upscaler, width: int, height: int, progress: Progress | None = None
) -> Image.Image:
    """The picture in exactly this size, RGB, or RGBA if it has transparency.

    As in the web UI: the upscaler runs over its own result while a side is too small, up to three times; what
    is then too large, or still too small, is resized by Lanczos. "Nearest" goes to the size at once. Networks
    of factor 1, which clean pictures, run once; so does latent diffusion, which draws all detail anew: from a
    quarter of the size, to which the picture is brought before.
    Raises RequestError for a size below one pixel.
    """
    if min(width, height) < 1:
        raise RequestError(f"a picture has at least 1 x 1 pixels, got {width} x {height}")
    result = image.convert("RGB")
    if isinstance(upscaler, Filter):
        result = result.resize((width, height), upscaler.filter)
    elif isinstance(upscaler, LatentUpscaler):
        quarter = (-(-width // upscaler.factor), -(-height // upscaler.factor))
        result = upscaler(result.resize(quarter, Image.Resampling.LANCZOS), progress)
        result = result.resize((width, height), Image.Resampling.LANCZOS)
    else:
        times = passes(upscaler.factor, max(width / image.width, height / image.height))
        # Each pass has factor * factor times as many pixels to draw as the one before.
        ends = list(accumulate((upscaler.factor ** (2 * i) for i in range(times)), initial=0))
        for begin, end in pairwise(ends):

            def tick(share: float, begin: int = begin, end: int = end) -> None:
                if progress is not None:
                    progress((begin + share * (end - begin)) / ends[-1])

            result = upscaler(result, tick)
        result = result.resize((width, height), Image.Resampling.LANCZOS)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        result.putalpha(alpha.resize((width, height), Image.Resampling.LANCZOS))
    return result


def passes(factor: int, size: float) -> int:
    """How often an upscaler runs until a picture is `size` times as large."""
    if factor == 1:
        return 1
    return next((i for i in range(MAX_PASSES) if factor**i >= size), MAX_PASSES)


def _from_file(path: Path, name: str, device: torch.device) -> NetworkUpscaler | LatentUpscaler:
    weights = read(path).tensors
    if any(key.startswith(UNET) for key in weights):
        return load_latent(path, device=device)
    try:
        return NetworkUpscaler(name, load_network(weights, device))
    except CheckpointError as error:
        raise named(path, error) from None


def _tiled(upscaler: NetworkUpscaler | LatentUpscaler, tile: int | None, overlap: int | None) -> Upscaler:
    """With other tiles than usual; None: the usual ones."""
    return replace(
        upscaler,
        tile=upscaler.tile if tile is None else tile,
        overlap=upscaler.overlap if overlap is None else overlap,
    )
