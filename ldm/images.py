"""From decoded pixels to picture files that say how they were made, in the text of `ldm.infotext`."""

import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ldm.errors import LdmError
from ldm.files import atomic_write


def to_pil(pixels: Tensor, text: str | None = None) -> Image.Image:
    """Turn decoded pixels (3, H, W) in [-1, 1] into a picture; values beyond are clamped.

    text: the settings, which the picture keeps in `info["parameters"]` and whenever it is saved as PNG.
    Levels are rounded to the nearest, as diffusers does; the web UI cuts the fraction off.
    Raises LdmError if there is a NaN or an infinity: a network failed, and the picture would be black.
    """
    pixels = pixels.detach().float().cpu()
    if not torch.isfinite(pixels).all():
        raise LdmError(
            "the picture came out as NaN or infinity; load the model with dtype float32 (or bfloat16)"
        )
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())  # (H, W, 3)
    return image if text is None else with_text(image, text)


def with_text(image: Image.Image, text: str) -> Image.Image:
    """Let a picture carry its settings: in `info`, as if read from a file, and into every PNG made of it."""
    chunks = PngImagePlugin.PngInfo()
    # Half a surrogate pair, from a badly encoded command line, fits into no file.
    chunks.add_text("parameters", text.encode("utf-8", "replace").decode())
    image.info["parameters"] = text
    # Pillow writes no text from `info`, but takes the options of `save` from here, too.
    image.encoderinfo = {"pnginfo": chunks}
    return image


def save_png(image: Image.Image, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a PNG file, whole or not at all, with the settings that the picture carries.

    Raises LdmError if `path` exists and `overwrite` is False; OSError if the disk is full or the like.
    """
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(_png(image))


def save_numbered(image: Image.Image, folder: str | os.PathLike[str], name: str) -> Path:
    """Save as the next picture of a folder, such as 00007-name.png, and return its path.

    The number follows the highest one there, whatever was deleted in between. A file that another process
    makes at the same moment is never replaced: its number is skipped.
    """
    data = _png(image)
    folder = Path(folder)
    taken = (re.match(r"\d{5,}(?=-)", path.name) for path in folder.iterdir())
    number = max((int(match[0]) for match in taken if match), default=-1) + 1
    while True:
        path = folder / f"{number:05d}-{name}.png"
        try:
            with atomic_write(path) as file:
                file.write(data)
            return path
        except LdmError:  # the name was taken meanwhile
            number += 1


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures on one sheet, row by row. It carries the first one's text.

    columns: pictures in a row; None: so many that the sheet is about as high as wide.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    text = images[0].info.get("parameters")
    return sheet if text is None else with_text(sheet, text)


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()
