"""Masks: against the web UI's own numbers, and that nothing outside them is ever touched."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import LdmError, RequestError
from ldm.masks import (
    Box,
    blurred,
    check_untouched,
    expanded,
    filled,
    from_alpha,
    from_box,
    from_picture,
    latent_mask,
    pasted,
    prepared,
    region,
)
from tests.golden_images import CASES, difference, picture

SIZE = (CASES["image_width"], CASES["image_height"])
MASKS = [case for case in CASES["mask_cases"] if case["crop_region_v2"] is not None]  # not the empty one


@pytest.mark.parametrize("case", MASKS, ids=lambda case: f"{case['mask_index']}-{case['pad']}")
def test_regions_are_those_of_the_web_ui(case: dict):
    box = region(picture(f"masks/{case['mask_index']}"), case["pad"])
    assert list(box) == case["crop_region_v2"]
    for shape, wanted in case["expanded"].items():
        width, height = map(int, shape.split("x"))
        assert list(expanded(box, (width, height), SIZE)) == wanted


def test_an_empty_mask_is_told():
    with pytest.raises(RequestError, match="the mask is empty"):
        region(picture("masks/7"))


def test_fill_is_that_of_the_web_ui():
    """Within the one level that versions of Pillow differ by."""
    result = filled(picture("noise/input"), picture("fill/mask"))
    assert difference(result, picture("fill/output")) <= 1


FULL = [255] * 12


@pytest.mark.parametrize(
    ("sigma", "edge"),
    [
        (1, [0, 0, 0, 0, 0, 0, 1, 15, 77, 178, 240, 254, *FULL[:12]]),
        (4, [6, 8, 12, 21, 32, 48, 67, 90, 115, 140, 165, 188, 207, 223, 234, 243, 248, 252, 254, *FULL[:5]]),
    ],
)  # fmt: skip
def test_blur_is_that_of_opencv(sigma: float, edge: list[int]):
    """Values of cv2.GaussianBlur 5.0.0 with the web UI's kernel; its fixed point is off by up to a level."""
    mask = Image.new("L", (24, 1))
    mask.paste(255, (9, 0, 24, 1))
    assert difference(blurred(mask, sigma), Image.fromarray(np.array([edge], np.uint8))) <= 1
    assert difference(blurred(mask.transpose(Image.Transpose.TRANSPOSE), sigma),
                      Image.fromarray(np.array([edge], np.uint8).T)) <= 1  # fmt: skip


@pytest.mark.parametrize("sigma", [1, 4])
def test_blur_is_close_to_pillows(sigma: int):
    """What older versions of the web UI did: three box filters, up to 6 levels off a true bell curve."""
    assert difference(blurred(picture("masks/0"), sigma), picture(f"masks/2_gaussian_blur_{sigma}")) <= 6


def test_blur_of_one_colour_and_of_nothing():
    for level in (0, 77, 255):
        mask = Image.new("L", (5, 3), level)
        assert difference(blurred(mask, 40), mask) == 0  # the kernel is wider than the mask
    mask = picture("masks/0")
    assert blurred(mask, 0) is mask


def test_masks_come_from_brightness_paint_or_holes():
    grey = Image.new("RGB", (2, 1), (90, 90, 90))
    assert from_picture(grey).getpixel((0, 0)) == 90
    layer = Image.new("RGBA", (3, 1), (0, 0, 0, 0))  # black paint on nothing
    layer.putpixel((1, 0), (0, 0, 0, 128))
    layer.putpixel((2, 0), (0, 0, 0, 129))
    assert list(from_picture(layer).tobytes()) == [0, 0, 255]
    layer.putpixel((0, 0), (9, 9, 9, 255))
    assert list(from_alpha(layer).tobytes()) == [0, 255, 255]
    with pytest.raises(RequestError, match="no transparent part"):
        from_alpha(grey)


def test_a_box_is_drawn_inside_the_picture():
    for box in ("2,1,4,3", (2, 1, 4, 3), " 2, 1, 4, 3 "):
        mask = from_box(box, (5, 4))
        assert mask.getbbox() == (2, 1, 4, 3)
        assert mask.getextrema() == (0, 255)
    assert from_box("-5,-5,3,99", (5, 4)).getbbox() == (0, 0, 3, 4)


@pytest.mark.parametrize("box", ["", "1,2,3", "a,b,c,d", "3,0,3,9", "9,9,12,12", "4,3,2,1", "1.5,2,3,4"])
def test_what_is_no_box_is_told(box: str):
    with pytest.raises(RequestError, match="box") as caught:
        from_box(box, (9, 9))
    assert len(str(caught.value)) <= 200


def test_a_mask_is_fitted_to_its_picture():
    mask = prepared(from_box("0,0,8,16", (16, 16)), (64, 65), invert=True, blur=2)
    assert mask.size == (64, 65)
    assert mask.getpixel((0, 30)) == 0
    assert mask.getpixel((63, 30)) == 255
    assert 0 < np.asarray(mask)[30, 32] < 255
    with pytest.raises(RequestError, match="shapes must match"):
        prepared(Image.new("L", (16, 32)), (16, 16))


def test_latent_masks_are_zero_or_one_unless_soft():
    mask = blurred(from_box("16,16,48,64", (64, 64)), 4)
    hard, soft = latent_mask(mask, 8, 8), latent_mask(mask, 8, 8, rounded=False)
    assert hard.shape == soft.shape == (1, 1, 8, 8)
    assert hard.unique().tolist() == [0, 1]
    assert len(soft.unique()) > 2
    assert hard[0, 0].nonzero().min(0).values.tolist() == [2, 2]  # rows and columns of the box, divided by 8
    assert hard[0, 0].nonzero().max(0).values.tolist() == [7, 5]


# Pasting


def noise(mode: str, size: tuple[int, int] = (37, 29), seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(levels)


def outside(image: Image.Image, mask: Image.Image) -> list:
    return np.asarray(image)[np.asarray(mask) == 0].tolist()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("box", [None, (5, 3, 30, 20)])
@pytest.mark.parametrize("blur", [0, 1, 4])
@pytest.mark.parametrize("drawn", [(37, 29), (64, 64)])
def test_pixels_outside_the_mask_are_identical(mode: str, box: Box | None, blur: int, drawn: tuple[int, int]):
    """Also the colours that hide in transparent pixels."""
    original = noise(mode)
    mask = blurred(from_box("12,9,20,15", original.size), blur)
    result = pasted(original, noise("RGB", drawn, seed=1), mask, box)
    assert (result.size, result.mode) == (original.size, mode)
    assert outside(result, mask) == outside(original, mask)
    assert difference(result, original) > 50  # but inside, they are not


def test_the_inside_is_what_was_drawn():
    original, drawn = noise("RGBA"), noise("RGB", seed=1)
    mask = from_box("12,9,20,15", original.size)
    result = pasted(original, drawn, mask)
    assert difference(result.convert("RGB").crop((12, 9, 20, 15)), drawn.crop((12, 9, 20, 15))) == 0
    assert result.getchannel("A").crop((12, 9, 20, 15)).getextrema() == (255, 255)


def test_a_part_is_pasted_where_it_was_cut():
    original = Image.new("RGB", (40, 30))
    mask = from_box("10,5,30,25", original.size)
    result = pasted(original, Image.new("RGB", (512, 512), (200, 100, 50)), mask, (8, 3, 32, 27))
    assert result.getpixel((10, 5)) == result.getpixel((29, 24)) == (200, 100, 50)
    assert result.getpixel((9, 5)) == result.getpixel((30, 24)) == (0, 0, 0)


def test_the_blur_of_the_whole_picture_reaches_outwards_only():
    """As in the web UI: at the edge of the mask, half masked, the result already shows fully."""
    original, drawn = Image.new("RGB", (40, 1)), Image.new("RGB", (40, 1), "white")
    mask = blurred(from_box("20,0,40,1", original.size), 3)
    red = np.asarray(pasted(original, drawn, mask))[0, :, 0]
    assert (red[20:] == 255).all()
    assert (red == np.minimum(2 * np.asarray(mask)[0].astype(int), 255)).all()
    part = np.asarray(pasted(original, drawn, mask, (8, 0, 40, 1)))[0, :, 0]
    assert (part[8:] == np.asarray(mask)[0, 8:]).all()
    assert (part[:8] == 0).all()


def test_holes_become_opaque_without_a_dark_fringe():
    original = Image.new("RGBA", (40, 1), (200, 200, 200, 255))
    original.paste((0, 0, 0, 0), (20, 0, 40, 1))
    mask = blurred(from_alpha(original), 3)
    result = pasted(original, Image.new("RGB", (40, 1), (200, 200, 200)), mask)
    assert result.mode == "RGB"  # nothing is transparent any more
    assert difference(result, Image.new("RGB", (40, 1), (200, 200, 200))) <= 1
    # Half shown over a hole, it is half transparent but has its own colour.
    grey = Image.new("L", (40, 1), 64)
    half = pasted(original, Image.new("RGB", (40, 1), (200, 200, 200)), grey).getpixel((30, 0))
    assert half == (200, 200, 200, 128)


def test_soft_inpainting_shows_only_what_changed():
    original, drawn = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    mask = blurred(from_box("16,0,64,64", original.size), 4)
    change = torch.zeros(1, 1, 8, 8)
    assert difference(pasted(original, drawn, mask, change=change), original) == 0
    change[..., 4:] = 1
    red = np.asarray(pasted(original, drawn, mask, change=change))[32, :, 0].astype(int)
    assert red[16] < 20
    assert red[60] == 255
    assert np.abs(np.diff(red)).max() < 60  # no step
    result = pasted(original, drawn, mask, change=torch.ones(1, 1, 8, 8))
    assert outside(result, mask) == outside(original, mask)
    part = pasted(original, drawn, mask, (8, 8, 56, 56), change=torch.ones(1, 1, 8, 8))
    assert outside(part, mask) == outside(original, mask)
    assert part.getpixel((40, 40)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_one_level_of_one_pixel_outside_is_noticed(mode: str):
    original = noise(mode)
    mask = from_box("12,9,20,15", original.size)
    changed = original.copy()
    changed.putpixel((12, 9), (1, 2, 3, 4)[: len(mode)])
    check_untouched(original, changed, mask)
    levels = np.array(original)
    levels[8, 12, 2] ^= 1
    with pytest.raises(LdmError, match="outside the mask"):
        check_untouched(original, Image.fromarray(levels), mask)


def test_only_the_colour_profile_is_handed_on():
    original = noise("RGB")
    original.info = {"icc_profile": b"a profile", "exif": b"turned", "parameters": "old"}
    result = pasted(original, original, from_box("1,1,5,5", original.size))
    assert result.info == {"icc_profile": b"a profile"}
