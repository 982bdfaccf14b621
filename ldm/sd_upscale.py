"""SD upscale: a picture is enlarged and then drawn anew, tile by tile, so that any size gets real detail.

Each tile is image to image in a size that the model is at home in, and neighbours are blended where they
overlap. The web UI's script of that name. All tiles have the same prompt: a high strength draws the whole of
it into each of them, so 0.2 to 0.4 is usual, or more with a ControlNet that holds the picture together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ldm.errors import LdmError, RequestError, check_range
from ldm.images import opaque, with_text
from ldm.infotext import Infotext, infotext
from ldm.inputs import Inputs
from ldm.models import Models
from ldm.pipeline import txt2img
from ldm.planning import autoencoder, plan
from ldm.request import Request
from ldm.sheets.cells import fingerprint
from ldm.tiles import Grid, blended, grid
from ldm.upscalers import Progress, Upscaler, enlarged


@dataclass(frozen=True, eq=False)
class Tiles:
    """An enlarged picture in tiles, each with what draws it anew: `txt2img(models, request, inputs)`."""

    enlarged: Image.Image  # RGB
    places: Grid
    runs: tuple[tuple[Request, Inputs], ...]  # in the order of places.boxes
    text: str  # the settings, for the whole picture

    def names(self, models: Models) -> list[str]:
        """For each tile the name of a file to keep it in: the same if and only if it is drawn the same."""
        return [f"{fingerprint(models, plan(models, *run))}.png" for run in self.runs]

    def joined(self, drawn: Iterable[Image.Image]) -> Image.Image:
        """The whole picture from its drawn tiles, which may be made while they are asked for."""
        levels = (torch.from_numpy(np.array(tile, dtype=np.float32)).permute(2, 0, 1) for tile in drawn)
        whole, top = Image.new("RGB", self.enlarged.size), 0
        for strip in blended(levels, self.places):  # (3, rows, W)
            rows = strip.round().to(torch.uint8).permute(1, 2, 0).contiguous()
            whole.paste(Image.fromarray(rows.numpy()), (0, top))
            top += len(rows)
        return with_text(whole, self.text)


def tiles(
    models: Models,
    request: Request,
    inputs: Inputs,
    upscaler: Upscaler,
    *,
    scale: float = 2.0,
    overlap: int | None = None,
    progress: Progress | None = None,
) -> Tiles:
    """Enlarge a picture and cut it into tiles.

    request: for each tile; its size is that of the tiles, None the one that the model was trained on. The
        n-th tile, from 0, has the seed + n.
    inputs: the picture, and hints or a depth picture of the whole of it, which are cut into tiles as well.
    overlap: of neighbours, in pixels; None: 8 pixels of the latent, which are the web UI's 64 with Stable
        Diffusion, but at most half a tile.
    progress: of the enlarging.
    Raises RequestError for settings that do not fit, as `ldm.plan` does for the tiles.
    """
    check_range("the scale", scale, 0.1, 16)
    if inputs.picture is None or inputs.mask is not None:
        raise RequestError("tiles are drawn from a picture, and without a mask; see inpaint for that")
    if request.batch_size != 1 or request.hires is not None or request.tiling:
        raise RequestError("tiles are drawn one at a time, without a second pass and not as textures")
    factor = autoencoder(models).config.factor
    width, height = whole_size(models, inputs.picture.size, scale)
    image = enlarged(opaque(inputs.picture), upscaler, width, height, progress)
    tile = (request.height or models.default_size, request.width or models.default_size)
    overlap = min(8 * factor, min(tile) // 2) if overlap is None else overlap
    places = grid(image.height, image.width, tile, overlap)

    def beside(other: Image.Image) -> Image.Image:
        return opaque(other).resize(image.size, Image.Resampling.LANCZOS)

    depth = inputs.depth and beside(inputs.depth)
    hints = [(control, beside(control.hint)) for control in inputs.controls]

    def cut(box: tuple[int, int, int, int]) -> Inputs:
        controls = tuple(replace(control, hint=hint.crop(box)) for control, hint in hints)
        return Inputs(picture=image.crop(box), depth=depth and depth.crop(box), controls=controls)

    one = replace(request, width=places.width, height=places.height)
    runs = tuple((replace(one, seed=request.seed + i), cut(box)) for i, box in enumerate(places.boxes))
    run = plan(models, *runs[0])
    about = {
        **dict(inputs.fields()),
        "SD upscale by": f"{scale:g}",
        "SD upscale overlap": str(overlap),
        "SD upscale upscaler": upscaler.name,
    }
    return Tiles(image, places, runs, infotext(run.settled, models, run.networks.hashes, about))


def whole_size(models: Models, size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(width, height) of an enlarged picture."""
    factor = autoencoder(models).config.factor
    width, height = (max(int(side * scale / factor), 1) * factor for side in size)
    return width, height


def chosen(info: Infotext) -> tuple[str, float, int]:
    """The upscaler's name, the scale and the overlap that a picture made here tells of itself.

    Raises LdmError if it was not drawn in tiles, or does not tell all of it, as those of the web UI.
    """
    try:
        values = [info.fields[f"SD upscale {name}"] for name in ("upscaler", "by", "overlap")]
        return values[0], float(values[1]), int(values[2])
    except (KeyError, ValueError):
        raise LdmError("this picture does not tell how it was drawn in tiles; give it as flags") from None


def sd_upscale(
    models: Models,
    request: Request,
    inputs: Inputs,
    upscaler: Upscaler,
    *,
    scale: float = 2.0,
    overlap: int | None = None,
) -> Image.Image:
    """Enlarge a picture and draw it anew, see `tiles`. The result carries its settings."""
    parts = tiles(models, request, inputs, upscaler, scale=scale, overlap=overlap)
    return parts.joined(txt2img(models, *run)[0] for run in parts.runs)
