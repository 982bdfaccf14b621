"""Tiles cover the picture, overlap, and leave no trace when they are put together."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import RequestError
from ldm.tiles import blended, grid, tiled

SIZES = [(1, 1), (7, 13), (64, 64), (65, 63), (191, 40), (129, 257)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (16, 5), (17, 16), (64, 8), (500, 8), (0, 8)])
def test_the_identity_in_tiles_gives_the_same_bits(height: int, width: int, tile: int, overlap: int) -> None:
    x = torch.randn(2, 3, height, width)
    assert torch.equal(tiled(lambda part: part, x, tile=tile, overlap=overlap, scale=1), x)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_function_of_single_pixels_is_the_same_in_tiles(scale: int) -> None:
    x = torch.rand(1, 3, 61, 47)

    def enlarged(part: Tensor) -> Tensor:
        return F.interpolate(part, scale_factor=scale, mode="nearest")

    assert torch.equal(tiled(enlarged, x, tile=20, overlap=6, scale=scale), enlarged(x))


def test_a_function_that_makes_pictures_smaller_is_the_same_in_tiles() -> None:
    x = torch.rand(1, 3, 160, 88)

    def reduced(part: Tensor) -> Tensor:
        return F.avg_pool2d(part, 8).repeat(1, 2, 1, 1)  # as an encoder: more channels

    result = tiled(reduced, x, tile=48, overlap=16, scale=1 / 8)
    torch.testing.assert_close(result, reduced(x), rtol=0, atol=1e-6)  # pooling sums in another order


def test_neighbours_that_differ_meet_without_a_seam() -> None:
    """Tiles of different brightness, the worst case: no step between pixels is larger than the ramp's."""
    brightness = iter(range(100))
    x = torch.zeros(1, 1, 100, 100)
    result = tiled(lambda part: part + next(brightness) % 2, x, tile=40, overlap=10, scale=1)[0, 0]
    assert result.min() == 0
    assert result.max() == 1
    for side in (0, 1):
        assert result.diff(dim=side).abs().max() <= 1 / 10 + 1e-6


@pytest.mark.parametrize("length", [*range(193, 230), 512, 1000, 4099])
@pytest.mark.parametrize(("tile", "overlap"), [(192, 8), (192, 0), (100, 99), (64, 33)])
def test_tiles_reach_from_edge_to_edge_and_overlap_as_asked(length: int, tile: int, overlap: int) -> None:
    places = grid(length, length, tile, overlap)
    assert places.tops == places.lefts
    assert places.tops[0] == 0
    assert places.tops[-1] == length - tile
    assert all(0 < after - before <= tile - overlap for before, after in pairwise(places.tops))


def test_tiles_lie_where_the_web_ui_puts_them() -> None:
    """`split_grid` of a 1000 x 700 picture, 512 x 384 tiles and an overlap of 64, worked out by hand.

    Columns: ceil(936 / 448) = 3, (1000 - 512) / 2 = 244 apart. Rows: ceil(636 / 320) = 2, 316 apart.
    """
    places = grid(700, 1000, (384, 512), 64)
    assert places.lefts == (0, 244, 488)
    assert places.tops == (0, 316)
    assert places.boxes[1] == (244, 0, 756, 384)
    assert places.boxes[-1] == (488, 316, 1000, 700)


def test_positions_are_multiples_where_asked() -> None:
    places = grid(1048, 1024, 512, 64, multiple=8)
    assert all(start % 8 == 0 for start in (*places.tops, *places.lefts))
    assert all(after - before <= 512 - 64 for before, after in pairwise(places.tops))


def test_no_call_sees_more_than_a_tile_and_progress_reaches_one() -> None:
    seen: list[tuple[int, ...]] = []
    shares: list[float] = []

    def function(part: Tensor) -> Tensor:
        seen.append(tuple(part.shape[-2:]))
        return part

    tiled(function, torch.zeros(1, 1, 300, 20), tile=64, overlap=8, scale=1, progress=shares.append)
    assert set(seen) == {(64, 20)}
    assert len(shares) == len(seen) == 6
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_a_tile_larger_than_the_picture_is_one_call() -> None:
    calls: list[Tensor] = []
    x = torch.rand(1, 3, 30, 50)
    tiled(lambda part: calls.append(part) or part, x, tile=192, overlap=8, scale=1)
    assert len(calls) == 1
    assert calls[0].shape == x.shape


def test_finished_tiles_blend_as_those_made_on_the_way() -> None:
    x = torch.rand(3, 70, 90)
    places = grid(70, 90, (32, 48), 8)
    parts = [x[:, top:bottom, left:right] for left, top, right, bottom in places.boxes]
    assert torch.equal(torch.cat(list(blended(parts, places)), dim=-2), x)


@pytest.mark.parametrize(
    ("tile", "overlap", "scale"), [(16, 16, 1), (16, 20, 1), (16, -1, 1), (20, 8, 1 / 8), (16, 4, 1 / 8)]
)
def test_numbers_that_make_no_grid_are_refused(tile: int, overlap: int, scale: float) -> None:
    with pytest.raises(RequestError):
        tiled(lambda part: part, torch.zeros(1, 1, 64, 64), tile=tile, overlap=overlap, scale=scale)
