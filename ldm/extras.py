"""A picture enlarged to any size by one upscaler or by two: the web UI's tab "Extras"."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import LdmError, RequestError, check_range
from ldm.images import read_picture, read_text, with_text
from ldm.infotext import quote
from ldm.upscalers import Progress, Upscaler, enlarged

MAX_SIDE = 65_535  # pixels; no kind of file that is written holds more


@dataclass(frozen=True, kw_only=True)
class Target:
    """How large pictures become. Raises RequestError for values that make no sense."""

    scale: float = 4.0
    max_side: int | None = None  # pixels; `scale` counts for less where a side would become longer
    size: tuple[int, int] | None = None  # (width, height) to cover in the picture's shape, instead of `scale`
    crop: bool = False  # cut off what lies beyond `size`, the same on both sides

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 64:
            raise RequestError(f"the scale must be above 0 and at most 64, got {self.scale:g}")
        if self.size is not None and self.max_side is not None:
            raise RequestError("give a size to cover, or the longest side that a scale may reach, not both")
        if self.crop and self.size is None:
            raise RequestError("give the size to crop to")
        for side in (*(self.size or ()), self.max_side):
            check_range("a side in pixels", side, 1, MAX_SIDE)

    def enlarged(self, width: int, height: int) -> tuple[int, int]:
        """The size that a picture of this size is enlarged to, before it is cropped.

        In whole pixels; the web UI goes down to a multiple of 8. Raises RequestError if a side would be
        longer than picture files allow.
        """
        scale = self.scale
        if self.size is not None:
            scale = max(self.size[0] / width, self.size[1] / height)
        elif self.max_side is not None:
            scale = min(scale, self.max_side / max(width, height))
        wide, high = (max(round(side * scale), 1) for side in (width, height))
        if max(wide, high) > MAX_SIDE:
            raise RequestError(f"{wide}x{high} pixels are too many; a side has at most {MAX_SIDE}")
        return wide, high

    def cropped(self, image: Image.Image) -> Image.Image:
        """The middle of an enlarged picture, if the rest is to be cut off."""
        if not self.crop or self.size is None:
            return image
        left, top = (image.width - self.size[0]) // 2, (image.height - self.size[1]) // 2
        return image.crop((left, top, left + self.size[0], top + self.size[1]))


@dataclass(frozen=True, kw_only=True)
class Extras:
    """By what pictures are enlarged, and how much. Raises RequestError for values that make no sense."""

    target: Target
    upscaler: Upscaler
    second: Upscaler | None = None  # its picture is laid over that of the first one ...
    visibility: float = 0.5  # ... so much, 0 to 1

    def __post_init__(self) -> None:
        check_range("visibility", self.visibility, 0, 1)

    def __call__(self, image: Image.Image, progress: Progress | None = None) -> Image.Image:
        """The enlarged picture, RGB or RGBA. progress: called with the share that is done, up to 1."""
        size = self.target.enlarged(*image.size)
        if self.second is None or self.visibility == 0:
            result = enlarged(image, self.upscaler, *size, progress)
        else:
            below = enlarged(image, self.upscaler, *size, _half(progress, 0))
            above = enlarged(image, self.second, *size, _half(progress, 1))
            result = Image.blend(below, above, self.visibility)
        return self.target.cropped(result)

    @property
    def text(self) -> str:
        """The settings as the web UI writes them: "Postprocess upscale by: 4, Postprocess upscaler: ..." """
        fields: dict[str, str] = {}
        if self.target.size is not None:
            fields["Postprocess upscale to"] = "{}x{}".format(*self.target.size)
        else:
            fields["Postprocess upscale by"] = f"{self.target.scale:g}"
        if self.target.max_side is not None:
            fields["Max side length"] = str(self.target.max_side)
        if self.target.crop:
            fields["Postprocess crop to"] = fields["Postprocess upscale to"]
        fields["Postprocess upscaler"] = quote(self.upscaler.name)
        if self.second is not None and self.visibility > 0:
            fields["Postprocess upscaler 2"] = quote(self.second.name)
            fields["Postprocess upscaler 2 visibility"] = (
                f"{self.visibility:g}"  # which the web UI leaves out
            )
        return ", ".join(f"{name}: {value}" for name, value in fields.items())


def enlarged_file(
    path: str | os.PathLike[str], extras: Extras, progress: Progress | None = None
) -> Image.Image:
    """Read a picture and enlarge it; the settings it carries stay, and those of `extras` come beside them.

    Saved as a PNG, it has the text chunks of the web UI: "parameters" with the settings it came with,
    "postprocessing" and "extras" with `extras.text`. Raises LdmError if the file cannot be read.
    """
    image = read_picture(path)
    result = extras(image, progress)
    result.info = dict(image.info)
    with suppress(LdmError):  # most pictures carry no settings
        with_text(result, read_text(path))
    options = getattr(result, "encoderinfo", {"pnginfo": PngInfo()})
    for name in ("postprocessing", "extras"):
        options["pnginfo"].add_text(name, extras.text)
        result.info[name] = extras.text
    result.encoderinfo = options
    return result


def _half(progress: Progress | None, number: int) -> Progress | None:
    """Progress of the first or the second half of a whole."""
    return None if progress is None else lambda share: progress((number + share) / 2)
