"""The measure of steering: 1 for the same edges, near 0 for others, and one pixel off still counts."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

import ldm
from benchmarks.controlnet import agreement, widened
from ldm.hints import canny


def square(left: int, side: int = 24) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).rectangle((left, 10, left + side, 10 + side), fill="red")
    return picture


def test_the_picture_of_a_hint_agrees_with_it():
    assert agreement(square(10), canny(square(10))) == 1


def test_one_pixel_off_counts_and_two_do_not():
    assert agreement(square(11), canny(square(10))) == 1
    assert agreement(square(12), canny(square(10))) < 0.7


def test_a_picture_without_edges_agrees_with_no_edges_only():
    blank = Image.new("RGB", (64, 64), "white")
    assert agreement(blank, canny(square(10))) == agreement(square(10), canny(blank)) == 0
    assert agreement(blank, canny(blank)) == 1


def test_half_of_the_edges_found_and_nothing_else_is_two_thirds():
    both = Image.new("RGB", (64, 64), "white")
    both.paste(square(4, 20).crop((0, 0, 32, 64)), (0, 0))
    both.paste(square(4, 20).crop((0, 0, 32, 64)), (32, 0))
    assert agreement(square(4, 20), canny(both)) == pytest.approx(2 / 3, abs=0.01)


def test_edges_widen_by_one_pixel_in_all_directions():
    edges = np.zeros((5, 6), dtype=bool)
    edges[0, 2] = True
    assert np.argwhere(widened(edges)).tolist() == [[y, x] for y in (0, 1) for x in (1, 2, 3)]


def test_the_controlnet_of_this_package_steers():
    models = ldm.load()
    network = ldm.load_controlnet("canny", models)
    hint = Image.new("RGB", (64, 64))
    ImageDraw.Draw(hint).ellipse((6, 14, 58, 58), outline="white")
    request = ldm.Request(prompt="red apple", seed=0, steps=10)

    def drawn(*controls: ldm.Control) -> float:
        [picture] = ldm.txt2img(models, request, ldm.Inputs(controls=controls))
        return agreement(picture, hint)

    # Measured: 0.33, 0.80 and 1.00; other processors round differently.
    assert drawn() < 0.5
    assert drawn(ldm.Control(network, hint)) > 0.7
    assert drawn(ldm.Control(network, hint, mode="control")) > 0.9
