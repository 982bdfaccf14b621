"""Fitting pictures into other sizes, against the web UI's own results and by what each way promises."""

import numpy as np
import pytest
from PIL import Image

from ldm.resize import Mode, lanczos, resized
from tests.golden_images import CASES, difference, picture

MODES: tuple[Mode, ...] = ("resize", "crop", "fill")  # 0, 1 and 2 in the web UI


@pytest.mark.parametrize("name", CASES["resize_cases"])
def test_every_mode_is_that_of_the_web_ui(name: str):
    """Within the one level that versions of Pillow differ by."""
    case = CASES["resize_cases"][name]
    result = resized(
        picture(f"{case['input']}/input"), case["width"], case["height"], MODES[case["resize_mode"]]
    )
    assert difference(result, picture(name)) <= 1


def test_masks_are_resized_alike():
    mask = picture("gradient/input").convert("L")
    assert difference(resized(mask, 16, 16), picture("gradient/L/16x16/mode0")) <= 1


def halves() -> Image.Image:
    """Red above blue, 40 x 20."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 10, 40, 20))
    return image


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (8, 64), (64, 8), (41, 21), (333, 32)])
@pytest.mark.parametrize("mode", MODES)
def test_every_pixel_is_covered(mode: Mode, size: tuple[int, int]):
    """Also where a centred picture leaves an odd number of rows or columns, which the web UI paints black."""
    image = resized(halves(), *size, mode)
    assert image.size == size
    red, green, blue = np.asarray(image).astype(int).transpose(2, 0, 1)
    assert green.max() == 0
    assert abs(red + blue - 255).max() <= 1


def test_crop_keeps_the_shape_and_the_middle():
    image = Image.new("RGB", (100, 50))
    image.paste((255, 255, 255), (25, 0, 75, 50))
    assert np.asarray(resized(image, 50, 50, "crop")).min() == 255
    assert resized(image, 200, 50, "crop").getpixel((100, 25)) == (255, 255, 255)


def test_fill_shows_all_and_continues_the_edges():
    image = np.asarray(resized(halves(), 40, 60, "fill"))
    assert (image[:30] == [255, 0, 0]).all()
    assert (image[30:] == [0, 0, 255]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1)])
def test_the_thinnest_pictures_fit(mode: Mode, shape: tuple[int, int]):
    image = resized(Image.new("RGB", shape, (9, 9, 9)), 64, 64, mode)
    assert np.abs(np.asarray(image).astype(int) - 9).max() == 0


def test_only_growing_is_left_to_the_upscaler():
    asked = []

    def enlarge(image: Image.Image, width: int, height: int) -> Image.Image:
        asked.append((width, height))
        return lanczos(image, width, height)

    resized(halves(), 20, 10, enlarge=enlarge)
    resized(halves(), 40, 20, enlarge=enlarge)
    resized(halves().convert("L"), 80, 80, enlarge=enlarge)
    assert asked == []
    resized(halves(), 41, 10, enlarge=enlarge)
    resized(halves(), 64, 64, "crop", enlarge=enlarge)
    resized(halves(), 64, 64, "fill", enlarge=enlarge)
    assert asked == [(41, 10), (128, 64), (64, 32)]


def test_transparency_is_resized_too():
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 40))
    alpha = np.asarray(resized(image, 16, 12, "fill").getchannel("A"))
    assert (alpha == 40).all()
