"""Outpainting: where the canvas grows, what it starts from, and that the picture itself stays."""

from typing import get_args

import numpy as np
import pytest
from PIL import Image

from ldm.errors import RequestError
from ldm.outpaint import Fill, extended, matched_noise


def scene(mode: str = "RGB") -> Image.Image:
    """Stripes below a plain sky, 48 x 32."""
    y, x = np.mgrid[0:32, 0:48]
    ground = np.stack([60 + 40 * np.sin(x), 120 + 0 * x, 40 + 0 * x], -1)
    levels = np.where((y > 15)[..., None], ground, [90, 150, 220]).astype(np.uint8)
    return Image.fromarray(levels).convert(mode)


@pytest.mark.parametrize("fill", get_args(Fill))
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_picture_keeps_its_pixels_and_only_new_ones_are_masked(fill: Fill, mode: str):
    canvas, mask = extended(scene(mode), left=8, top=16, bottom=5, fill=fill, overlap=0)
    assert canvas.size == mask.size == (56, 53)
    assert canvas.mode == mode
    assert canvas.crop((8, 16, 56, 48)).tobytes() == scene(mode).tobytes()
    expected = np.full((53, 56), 255)
    expected[16:48, 8:56] = 0
    assert (np.asarray(mask) == expected).all()


def test_the_mask_overlaps_where_the_canvas_grows():
    _, mask = extended(scene(), right=8, top=8, overlap=4)
    rows, columns = (np.asarray(mask) == 0).nonzero()
    assert (columns.min(), columns.max()) == (0, 48 - 4 - 1)
    assert (rows.min(), rows.max()) == (8 + 4, 8 + 32 - 1)


def test_something_of_the_smallest_picture_is_kept():
    for size in ((1, 1), (2, 3), (5, 40)):
        _, mask = extended(Image.new("RGB", size), left=8, right=8, top=8, bottom=8, overlap=100)
        assert np.asarray(mask).min() == 0


def test_edges_continue_the_outermost_pixels():
    canvas = np.asarray(extended(scene(), right=9, top=7, fill="edges")[0])
    assert (canvas[:7, :48] == canvas[7, :48]).all()
    assert (canvas[:, 48:] == canvas[:, 47:48]).all()


def test_noise_has_the_colours_of_the_picture():
    """The same quantiles in every channel, but for the rounding to levels."""
    y, x = np.mgrid[0:32, 0:48]
    picture = np.stack([50 + 4 * x, 255 - 3 * y, x * y // 8], -1).astype(np.uint8)
    canvas = np.asarray(extended(Image.fromarray(picture), right=48, fill="noise")[0])
    quantiles = np.linspace(0, 1, 21)
    for channel in range(3):
        old, new = (np.quantile(part[..., channel], quantiles) for part in (picture, canvas[:, 48:]))
        assert np.abs(new - old).max() <= 4  # one step of the picture's own levels
    assert len(np.unique(canvas[:, 48:].reshape(-1, 3), axis=0)) > 1000


def test_noise_has_the_frequencies_of_the_picture():
    """Upright stripes make noise that changes along rows, lying ones along columns."""
    x = np.arange(64)
    stripes = np.repeat((128 + 100 * np.sin(x))[None, :, None], 64, axis=0).repeat(3, axis=2).astype(np.uint8)
    known = np.zeros((64, 64), dtype=bool)
    known[:, :40] = True
    for turned in (False, True):
        pixels, mask = (stripes.transpose(1, 0, 2), known.T) if turned else (stripes, known)
        noise = matched_noise(pixels, mask).astype(float).mean(-1)
        noise = noise[40:] if turned else noise[:, 40:]
        along_rows, along_columns = (
            np.abs(np.diff(noise, axis=1)).mean(),
            np.abs(np.diff(noise, axis=0)).mean(),
        )
        assert (along_columns > 2 * along_rows) if turned else (along_rows > 2 * along_columns)


def test_noise_is_that_of_its_seed():
    first, again, other = (extended(scene(), left=16, fill="noise", seed=s)[0] for s in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_a_picture_of_one_colour_grows_in_it():
    for fill in get_args(Fill):
        canvas, _ = extended(Image.new("RGB", (16, 16), (9, 80, 200)), left=4, bottom=4, fill=fill)
        assert np.unique(np.asarray(canvas).reshape(-1, 3), axis=0).tolist() == [[9, 80, 200]]


@pytest.mark.parametrize("sides", [{}, {"left": 0}, {"left": -8}, {"top": 16_384}, {"bottom": 10**9}])
def test_what_cannot_grow_is_told(sides: dict):
    with pytest.raises(RequestError) as caught:
        extended(scene(), **sides)
    assert len(str(caught.value)) <= 200
