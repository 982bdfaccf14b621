"""A function of pictures, run on tiles that overlap, so that memory does not grow with the picture.

Neighbouring tiles are blended by linear ramps over all they share: where one tile sees little of what lies
around, near its border, the other counts. Upscalers, the autoencoder and tiled image to image share this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.errors import RequestError


@dataclass(frozen=True)
class Grid:
    """Where tiles lie, in pixels. All have one size; the last ones end at the picture's edge."""

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    height: int  # of each tile
    width: int

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) of every tile, row by row, as Pillow's `crop` takes them."""
        return [(left, top, left + self.width, top + self.height) for top in self.tops for left in self.lefts]


def grid(height: int, width: int, tile: int | tuple[int, int], overlap: int, *, multiple: int = 1) -> Grid:
    """Cover a picture with as few tiles as can be, evenly spread (the web UI's `split_grid`).

    tile: side, or (height, width), of a tile in pixels; cut to the picture's size. 0: the whole side.
    overlap: of neighbours in pixels, at least.
    multiple: all positions are multiples of this, and so must be the picture, the tile and the overlap.
    Raises RequestError for numbers that make no grid.
    """
    tile_height, tile_width = tile if isinstance(tile, tuple) else (tile, tile)
    tile_height, tile_width = min(tile_height or height, height), min(tile_width or width, width)
    return Grid(
        _starts(height, tile_height, overlap, multiple),
        _starts(width, tile_width, overlap, multiple),
        tile_height,
        tile_width,
    )


def _starts(length: int, tile: int, overlap: int, multiple: int) -> tuple[int, ...]:
    """Where tiles begin along one side."""
    if any(n % multiple for n in (length, tile, overlap)):
        raise RequestError(
            f"picture, tile and overlap must be multiples of {multiple}, got {length}, {tile}, {overlap}"
        )
    if tile == length:
        return (0,)
    if not 0 <= overlap < tile:
        raise RequestError(f"tiles of {tile} pixels cannot overlap by {overlap}; make the tiles larger")
    length, tile, overlap = length // multiple, tile // multiple, overlap // multiple
    count = math.ceil((length - overlap) / (tile - overlap))
    # Whole numbers only, rounded down: a gap of two starts is never wider than tile - overlap.
    return tuple((length - tile) * i // (count - 1) * multiple for i in range(count))


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    scale: float,
    progress: Callable[[float], object] | None = None,
) -> Tensor:
    """`function(x)`, one tile at a time.

    function: maps a tile (B, C, h, w) to (B, C', h * scale, w * scale), on any device.
    x: (B, C, H, W). Returns (B, C', H * scale, W * scale), on the device of x.
    tile, overlap: in pixels of x, see `grid`.
    scale: output pixels per input pixel along a side: a whole number, or 1 over a whole number, of which
        H, W, tile and overlap must then be multiples.
    progress: called after each tile with the share that is done, up to 1.
    """
    return torch.cat(
        list(tiled_strips(function, x, tile=tile, overlap=overlap, scale=scale, progress=progress)), dim=-2
    )


def tiled_strips(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    scale: float,
    progress: Callable[[float], object] | None = None,
) -> Iterator[Tensor]:
    """The result of `tiled` from top to bottom in strips (B, C', any height, W * scale), as they are done.

    For what is stored more compactly than it is computed, such as a picture in 8 bit.
    """
    places = grid(x.shape[-2], x.shape[-1], tile, overlap, multiple=max(1, round(1 / scale)))
    boxes = places.boxes

    def result(number: int) -> Tensor:
        left, top, right, bottom = boxes[number]
        part = function(x[..., top:bottom, left:right]).to(x.device)
        if progress is not None:
            progress((number + 1) / len(boxes))
        return part

    return blended(map(result, range(len(boxes))), places, scale)


def blended(tiles: Iterable[Tensor], places: Grid, scale: float = 1) -> Iterator[Tensor]:
    """Put tiles (..., h * scale, w * scale) together; yields strips of the picture from top to bottom.

    tiles: one for each of `places.boxes`, in that order; they may be made while they are asked for.
    """
    tiles = iter(tiles)
    lefts, tops = ([round(start * scale) for start in starts] for starts in (places.lefts, places.tops))

    def rows() -> Iterator[Tensor]:
        for _ in tops:
            yield torch.cat(list(_joined((next(tiles) for _ in lefts), lefts, dim=-1)), dim=-1)

    return _joined(rows(), tops, dim=-2)


def _joined(pieces: Iterator[Tensor], starts: list[int], dim: int) -> Iterator[Tensor]:
    """Blend pieces that overlap along `dim`; yields each part that no later piece reaches."""
    open_end = next(pieces)
    for start, following in pairwise(starts):
        yield open_end.narrow(dim, 0, following - start)
        shared = open_end.shape[dim] - (following - start)
        old, piece = open_end.narrow(dim, following - start, shared), next(pieces)
        ramp = (torch.arange(shared, device=piece.device, dtype=torch.float32) + 0.5) / max(shared, 1)
        new, rest = piece.narrow(dim, 0, shared), piece.narrow(dim, shared, piece.shape[dim] - shared)
        # old + ramp * (new - old) where both agree gives exactly what they agree on.
        mixed = torch.lerp(old, new, ramp.to(piece.dtype).unflatten(0, (-1,) + (1,) * (-dim - 1)))
        open_end = torch.cat([mixed, rest], dim)
    yield open_end
