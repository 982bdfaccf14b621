"""Colour correction: known colours, exact matching, and brightness that is left alone."""

import numpy as np
import pytest
from PIL import Image

from ldm.color import match_histogram, matched, to_lab, to_rgb, with_luminosity


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((0.5, 0.5, 0.5), (53.39, 0, 0)),
        ((0.02, 0.02, 0.02), (1.40, 0, 0)),  # on the straight parts of both curves
    ],
)
def test_known_colours_in_cielab(rgb: tuple, lab: tuple):
    """Published values, which vary in the second digit with the digits of the matrix used."""
    assert np.abs(to_lab(np.array(rgb, dtype=float)) - lab).max() < 0.03


def test_cielab_and_back_is_the_same():
    rgb = np.random.default_rng(0).random((40, 30, 3))
    assert np.abs(to_rgb(to_lab(rgb)) - rgb).max() < 1e-12


def test_impossible_colours_are_clipped():
    lab = np.array([[50.0, 120, -120], [100, 50, 50], [-5, 0, 0]])
    rgb = to_rgb(lab)
    assert rgb.min() >= 0
    assert rgb.max() <= 1


def test_matching_takes_over_the_histogram():
    """Where both have as many values and none twice, it is the sorted values in the old order."""
    rng = np.random.default_rng(0)
    values, wanted = rng.random(500), rng.random(500) ** 3
    result = match_histogram(values, wanted)
    assert np.abs(np.sort(result) - np.sort(wanted)).max() < 1e-15
    assert (np.argsort(result) == np.argsort(values)).all()
    assert np.abs(match_histogram(values.reshape(20, 25), values) - values.reshape(20, 25)).max() < 1e-15


def test_matching_keeps_equal_values_equal():
    assert match_histogram(np.array([1, 1, 2, 2]), np.array([10, 20, 30, 40])).tolist() == [20, 20, 40, 40]


def test_luminosity_is_taken_over_exactly():
    rng = np.random.default_rng(0)
    colour, light = rng.random((30, 30, 3)), rng.random((30, 30, 3)) ** 2
    result = with_luminosity(colour, light)
    luma = [0.299, 0.587, 0.114]
    assert np.abs(result @ luma - light @ luma).max() < 1e-12
    assert result.min() >= 0
    assert result.max() <= 1


def picture() -> Image.Image:
    y, x = np.mgrid[0:48, 0:64] / 63
    return Image.fromarray(
        (255 * np.stack([0.2 + 0.7 * x, 0.3 + 0.5 * y, 0.6 - 0.5 * x * y], -1)).astype(np.uint8)
    )


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a).astype(float) - np.asarray(b)).mean())


def test_a_picture_matched_to_itself_is_the_same():
    assert mean_difference(matched(picture(), picture()), picture()) < 0.01


def test_a_cast_is_taken_away():
    """A purple shade of the same brightness, the drift that image to image is known for."""
    cast = np.array([30.0, -25.0, 50.0])
    cast -= cast @ [0.299, 0.587, 0.114]
    tinted = Image.fromarray((np.asarray(picture()) + cast).clip(0, 255).astype(np.uint8))
    assert mean_difference(tinted, picture()) > 20
    assert mean_difference(matched(tinted, picture()), picture()) < 4


def test_light_and_shade_are_left_alone():
    rng = np.random.default_rng(0)
    other = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    result = matched(picture(), other)
    assert mean_difference(result.convert("L"), picture().convert("L")) < 1
    assert mean_difference(result, picture()) > 10


def test_the_size_of_the_reference_does_not_matter():
    larger = picture().resize((128, 96), Image.Resampling.NEAREST)
    assert mean_difference(matched(picture(), larger), picture()) < 0.01
