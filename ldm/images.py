"""From decoded pixels to picture files that say how they were made.

The settings travel as one text, laid out as in the AUTOMATIC1111 web UI, which many tools read:

    prompt
    Negative prompt: what to avoid
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x512, ...
"""

import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import ldm
from ldm.errors import LdmError
from ldm.files import atomic_write
from ldm.models import Models
from ldm.request import Request
from ldm.samplers import SAMPLERS
from ldm.spacings import SPACINGS


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


def infotext(request: Request, models: Models) -> str:
    """The settings of one picture as text: the fields, their order and their quoting are the web UI's.

    request: as settled by `ldm.pipeline.plan`: nothing that decides the picture is None.
    """
    fields = ", ".join(
        name if name == text else f"{name}: {quote(text)}" for name, text in _fields(request, models)
    )
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{request.prompt}{negative}\n{fields}".strip()


def quote(text: str) -> str:
    """A value of a field, as a JSON string where it would otherwise run into the next field."""
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def _fields(request: Request, models: Models) -> Iterator[tuple[str, str]]:
    assert request.sampler is not None
    assert request.schedule is not None
    assert request.cfg_scale is not None
    yield "Steps", str(request.steps)
    yield "Sampler", request.sampler
    yield "Schedule type", SPACINGS[request.schedule].label
    yield "CFG scale", _number(request.cfg_scale)
    yield "Seed", str(request.seed)
    yield "Size", f"{request.width}x{request.height}"
    if models.hash is not None:
        yield "Model hash", models.hash
        yield "Model", models.name
    if request.clip_skip is not None and request.clip_skip > 1:
        yield "Clip skip", str(request.clip_skip)
    yield "RNG", "CPU"
    if request.cfg_rescale:
        yield "CFG rescale", _number(request.cfg_rescale)

    defaults = SAMPLERS[request.sampler].options
    names = {
        "eta": "Eta DDIM" if request.sampler == "DDIM" else "Eta",
        "s_churn": "Sigma churn",
        "s_tmin": "Sigma tmin",
        "s_tmax": "Sigma tmax",
        "s_noise": "Sigma noise",
        "order": "UniPC order" if request.sampler == "UniPC" else "Sampler order",
    }
    for option, value in request.sampler_options().items():
        if value != defaults.get(option):
            yield names[option], _number(value)
    overrides = {
        "Schedule max sigma": request.sigma_max,
        "Schedule min sigma": request.sigma_min,
        "Schedule rho": request.rho,
    }
    for name, value in overrides.items():
        if value is not None:
            yield name, _number(value)
    yield "Version", f"ldm {ldm.__version__}"


def _number(value: float) -> str:
    """7.0 -> "7", 6.5 -> "6.5": the shortest text that reads back as the same number."""
    return repr(value).removesuffix(".0")


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


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """All pictures on one sheet, row by row, about as high as wide. It carries the first one's text."""
    columns = math.ceil(math.sqrt(len(images)))
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
