"""Fit a picture into another size: stretched, cut, or whole with its edges stretched over the rest.

The three ways of the web UI, with its rounding.
"""

from collections.abc import Callable
from typing import Literal

from PIL import Image

Enlarge = Callable[[Image.Image, int, int], Image.Image]
"""(image, width, height) -> the picture in exactly that size, which is larger in at least one direction."""

Mode = Literal["resize", "crop", "fill"]


def lanczos(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resample with a windowed sinc: sharp, without inventing anything."""
    return image.resize((width, height), Image.Resampling.LANCZOS)


def resized(
    image: Image.Image, width: int, height: int, mode: Mode = "resize", enlarge: Enlarge = lanczos
) -> Image.Image:
    """Make a picture of any mode width x height pixels large.

    mode: "resize" changes its shape if need be; "crop" covers the size and cuts equally from both sides;
        "fill" puts all of it in the middle and stretches its outermost pixels over what stays free.
    enlarge: what does it where the picture must grow, such as an upscaler. Masks ("L") are never given to it.
    """
    if mode == "resize":
        return _scaled(image, width, height, enlarge)
    # Integers throughout: a ratio of floats would lose a pixel here and there.
    wider = image.width * height > width * image.height  # than the target
    across = max(image.width * height // image.height, 1)  # the width at the target's height
    down = max(image.height * width // image.width, 1)
    inner = (across, height) if wider == (mode == "crop") else (width, down)
    scaled = _scaled(image, *inner, enlarge)
    left, top = width // 2 - scaled.width // 2, height // 2 - scaled.height // 2
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(scaled, (left, top))
    if mode == "fill":
        _continue_edges(canvas, scaled, left, top)
    return canvas


def _scaled(image: Image.Image, width: int, height: int, enlarge: Enlarge) -> Image.Image:
    if image.mode != "L" and (width > image.width or height > image.height):
        return enlarge(image, width, height)
    return lanczos(image, width, height)


def _continue_edges(canvas: Image.Image, inner: Image.Image, left: int, top: int) -> None:
    """Stretch the outermost pixels of `inner`, which lies at (left, top), over the rest of `canvas`."""
    width, height = inner.size
    strips = {  # where to, and which edge of `inner`: a box without thickness, which `resize` continues
        (0, 0, canvas.width, top): (0, 0, width, 0),
        (0, top + height, canvas.width, canvas.height): (0, height, width, height),
        (0, 0, left, canvas.height): (0, 0, 0, height),
        (left + width, 0, canvas.width, canvas.height): (width, 0, width, height),
    }
    for (x0, y0, x1, y1), edge in strips.items():
        if x1 > x0 and y1 > y0:
            canvas.paste(inner.resize((x1 - x0, y1 - y0), box=edge), (x0, y0))
