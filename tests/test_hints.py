"""Hints without a network: edges are OpenCV's to the pixel, the others what their names say."""

from textwrap import dedent

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.errors import RequestError
from ldm.hints import HINTS, canny, invert, threshold, tile


def drawing() -> Image.Image:
    """A disc and a triangle that touch, on colours that change slowly, with a faint bar below."""
    y, x = np.mgrid[:20, :28]
    levels = np.stack([60 + 4 * x, 200 - 6 * y, 40 + 0 * x], axis=2)
    levels[(x - 9) ** 2 + (y - 9) ** 2 < 40] = (230, 40, 90)
    levels[(x >= 15) & (x <= 24) & (y >= 4) & (y - 4 <= x - 15)] = (90, 120, 250)
    levels[15:18, 3:26] += (20, 25, 30)
    return Image.fromarray(levels.astype(np.uint8))


def shown(edges: Image.Image) -> str:
    return "\n".join("".join("#" if v else "." for v in row) for row in np.asarray(edges.convert("L")))


# cv2.Canny(drawing(), low, high) of OpenCV 5.0.0.
OPENCV = {
    (100, 200): """
        ............................
        ............................
        .........#..................
        .......##.##...#########....
        .....##.....##.#........#...
        ....##.......#.##.......#...
        ....#...........##......#...
        ...#.............##.....#...
        ...#...........#..##....#...
        ..#.............#..##...#...
        ...#...........#....##..#...
        ...#...........#.....##.#...
        ....#.........#.......##....
        ....##.......##........#....
        .....##....###..............
        ......###.##................
        .........#..................
        ............................
        ............................
        ............................
    """,
    (40, 120): """
        ............................
        ............................
        .........#..................
        .......##.##...#########....
        .....##.....##.#........#...
        ....##.......#.##.......#...
        ....#...........##......#...
        ...#.............##.....#...
        ...#...........#..##....#...
        ..#.............#..##...#...
        ...#...........#....##..#...
        ...#...........#.....##.#...
        ....#.........#.......##....
        ....##.......##........#....
        .....##....###..............
        ...#..###.##.............#..
        .........#..................
        ...####.....##############..
        ............................
        ............................
    """,
}


@pytest.mark.parametrize("levels", OPENCV)
def test_canny_edges_are_those_of_opencv(levels: tuple[int, int]):
    edges = canny(drawing(), *levels)
    assert shown(edges) == dedent(OPENCV[levels]).strip()
    assert set(np.unique(np.asarray(edges))) == {0, 255}


def test_the_usual_thresholds_are_100_and_200():
    assert shown(canny(drawing())) == dedent(OPENCV[100, 200]).strip()


def test_weak_edges_count_where_they_go_on_from_strong_ones():
    picture = Image.new("L", (32, 16))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 8, 31, 15), fill=40)  # a weak step ...
    pen.rectangle((24, 8, 31, 15), fill=80)  # ... that is strong at its right end
    pen.rectangle((0, 0, 31, 2), fill=40)  # and a weak one by itself
    edges = np.asarray(canny(picture, 100, 300).convert("L"))
    assert edges[8, 2] or edges[7, 2]
    assert not edges[:5].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 2)])
@pytest.mark.parametrize("name", [name for name in HINTS if name != "none"])
def test_pictures_of_any_size_and_mode_keep_their_size(name: str, size: tuple[int, int]):
    for mode in ("RGB", "RGBA", "L", "P", "LA", "1"):
        hint = HINTS[name](Image.new(mode, size))
        assert (hint.size, hint.mode) == (size, "RGB")


def test_what_is_transparent_counts_as_white():
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    ImageDraw.Draw(picture).rectangle((4, 4, 11, 11), fill="black")
    on_white = Image.new("RGB", (16, 16), "white")
    ImageDraw.Draw(on_white).rectangle((4, 4, 11, 11), fill="black")
    for hint in (canny, invert, tile, threshold):
        assert hint(picture).tobytes() == hint(on_white).tobytes()
    assert np.asarray(canny(picture)).any()


def test_none_leaves_a_hint_as_it_is():
    picture = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    assert HINTS["none"](picture) is picture


def test_inverting_twice_gives_the_same_picture():
    assert invert(invert(drawing())).tobytes() == drawing().tobytes()
    assert invert(Image.new("RGB", (1, 1), (255, 200, 0))).getpixel((0, 0)) == (0, 55, 255)


def test_a_tile_keeps_the_mean_and_loses_details():
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (32, 16)))
    blurred = np.asarray(tile(stripes, 4)).astype(float)
    assert abs(blurred.mean() - 127.5) <= 1
    assert blurred.std() < 1
    assert tile(drawing(), 1).tobytes() == drawing().tobytes()


def test_a_threshold_parts_bright_from_dark():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    assert np.flatnonzero(np.asarray(threshold(ramp, 99).convert("L"))[0]).tolist() == list(range(100, 256))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: canny(drawing(), 200, 100), "0 <= low <= high, got 200 and 100"),
        (lambda: canny(drawing(), -1), "0 <= low <= high"),
        (lambda: tile(drawing(), 0), "factor of 1 or more"),
        (lambda: threshold(drawing(), 256), "0 to 255"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message: str):
    with pytest.raises(RequestError, match=message):
        make()
