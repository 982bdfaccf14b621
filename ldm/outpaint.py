"""Outpainting: a larger canvas around a picture, something for a model to start from there, and its mask."""

from typing import Literal

import numpy as np
from PIL import Image

from ldm.color import match_histogram
from ldm.errors import RequestError, check_range
from ldm.images import opaque

Fill = Literal["edges", "noise"]

MAX_SIDE = 16_384


def extended(
    picture: Image.Image,
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    fill: Fill = "edges",
    overlap: int = 8,
    seed: int = 0,
) -> tuple[Image.Image, Image.Image]:
    """Add that many pixels on each side of an RGB or RGBA picture; give them to repaint.

    fill: what the new part starts from. "edges" continues the outermost pixels, so that sky stays sky and a
        plain background plain, at any strength. "noise" has the colours and the texture of the whole picture,
        see `matched_noise`: it suggests things to draw, but shows through unless the strength is 0.8 or more.
    overlap: how far the mask reaches into the picture, in pixels, on the sides that grow: what is drawn needs
        some room to join. All other pixels stay as they are.
    Returns the larger picture, and the mask, white on what is to be drawn. Raises RequestError if no side
    grows, or if the result were larger than MAX_SIDE.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, pixels in sides.items():
        check_range(f"the number of pixels to add at the {name}", pixels, 0, MAX_SIDE)
    width, height = picture.width + left + right, picture.height + top + bottom
    if not any(sides.values()):
        raise RequestError("there is nothing to draw: give the pixels to add, such as left=64")
    if max(width, height) > MAX_SIDE:
        raise RequestError(f"the picture would be {width}x{height}; at most {MAX_SIDE} pixels a side")
    kept = _shrunk((left, top, left + picture.width, top + picture.height), sides, overlap)
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, kept)

    pixels = np.pad(np.asarray(opaque(picture)), ((top, bottom), (left, right), (0, 0)), mode="edge")
    if fill == "noise":
        known = np.zeros((height, width), dtype=bool)
        known[top : top + picture.height, left : left + picture.width] = True
        pixels = np.where(known[..., None], pixels, matched_noise(pixels, known, seed))
    canvas = Image.fromarray(pixels).convert(picture.mode)
    canvas.paste(picture, (left, top))
    canvas.info = dict(picture.info)
    return canvas, mask


def _shrunk(box: tuple[int, int, int, int], sides: dict[str, int], overlap: int) -> tuple[int, int, int, int]:
    """The part of the picture to keep: `overlap` less where the canvas grows, but never nothing."""
    x0, y0, x1, y1 = box
    across, down = min(overlap, (x1 - x0 - 1) // 2), min(overlap, (y1 - y0 - 1) // 2)
    return (
        x0 + across * (sides["left"] > 0),
        y0 + down * (sides["top"] > 0),
        x1 - across * (sides["right"] > 0),
        y1 - down * (sides["bottom"] > 0),
    )


def matched_noise(pixels: np.ndarray, known: np.ndarray, seed: int = 0) -> np.ndarray:
    """Noise that looks like the known part of a picture from afar: its spatial frequencies and its colours.

    pixels: (H, W, 3) uint8. known: (H, W) bool. Returns (H, W, 3) uint8; only what is unknown is of use.

    White noise, smoothed, is given the Fourier spectrum of the picture, and then its histogram. After
    "outpainting mk2" of the web UI (parlance-zz, 2022), whose noise is nearly grey and falls off as 1 / f^2.
    """
    height, width = known.shape
    rng = np.random.default_rng(seed)
    # The mean instead of black outside: a hard edge would put its own stripes into the spectrum.
    picture = np.where(known[..., None], pixels, pixels[known].mean(axis=0)) / 255
    noise = rng.random((height, width, 1)) * 0.95 + rng.random((height, width, 3)) * 0.05
    y, x = np.fft.fftfreq(height)[:, None, None], np.fft.fftfreq(width)[:, None]
    scale = 2 * np.array([height, width]) / min(height, width)
    smooth = 1 / (((scale[0] * y) ** 2 + 1) * ((scale[1] * x) ** 2 + 1))
    spectrum = np.fft.fft2(picture, axes=(0, 1)) * np.abs(np.fft.fft2(noise, axes=(0, 1)) * smooth) ** 2
    shaped = np.fft.ifft2(spectrum, axes=(0, 1)).real
    result = pixels.copy()
    for channel in range(3):
        values = match_histogram(shaped[~known][:, channel], pixels[known][:, channel])
        result[~known, channel] = values.round()
    return result
