"""Hints for ControlNet that need no network: edges, inverted lines, blurred tiles, black and white.

Each is a function from a picture to an RGB picture of the same size; what is transparent counts as white, as
a page shows it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Resampling

from ldm.errors import RequestError
from ldm.images import opaque

Hint = Callable[[Image.Image], Image.Image]

_TAN = 0.41421356  # tan(22.5 degrees): where one of the eight directions of a gradient ends


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """White edges of one pixel's width on black (Canny 1986, IEEE PAMI 8(6), 679-698).

    low, high: of the steepness |dx| + |dy|, for which a step of one level counts 4 (the Sobel filter). Edges
        begin where it exceeds `high` and go on while it exceeds `low`.

    As OpenCV's function, which made the hints that the published networks were trained on, to the pixel: of
    the three colours the steepest one counts, and nothing is blurred but by the Sobel filter itself.
    """
    if not 0 <= low <= high:
        raise RequestError(f"canny edges need 0 <= low <= high, got {low:g} and {high:g}")
    levels = np.asarray(opaque(image), dtype=np.int32)  # (H, W, 3)
    dx = _filtered(_filtered(levels, (-1, 0, 1), axis=1), (1, 2, 1), axis=0)
    dy = _filtered(_filtered(levels, (-1, 0, 1), axis=0), (1, 2, 1), axis=1)
    steepness = abs(dx) + abs(dy)
    steepest = steepness.argmax(axis=2)[:, :, None]
    dx, dy, steepness = (np.take_along_axis(a, steepest, 2)[:, :, 0] for a in (dx, dy, steepness))
    edges = _connected(_thinned(steepness, dx, dy), low, high)
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def _filtered(levels: np.ndarray, weights: tuple[int, int, int], axis: int) -> np.ndarray:
    """Three weights along one axis; beyond the border, the outermost pixels go on."""
    padded = np.pad(levels, [(int(i == axis),) * 2 for i in range(levels.ndim)], mode="edge")
    size = levels.shape[axis]
    before, here, after = (padded.take(range(i, i + size), axis) for i in range(3))
    return weights[0] * before + weights[1] * here + weights[2] * after


def _thinned(steepness: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The steepness on its ridges, where both neighbours along the gradient are less steep; else 0."""
    padded = np.pad(steepness, 1)
    height, width = steepness.shape

    def neighbour(y: int, x: int) -> np.ndarray:
        return padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    across, down = abs(dy) < _TAN * abs(dx), _TAN * abs(dy) > abs(dx)
    falling, rising = ~across & ~down & (dx * dy >= 0), ~across & ~down & (dx * dy < 0)
    m = steepness
    # A step between two pixels is equally steep on both: one of them counts, or the edge would be double.
    ridge = across & (m > neighbour(0, -1)) & (m >= neighbour(0, 1))
    ridge |= down & (m > neighbour(-1, 0)) & (m >= neighbour(1, 0))
    ridge |= falling & (m > neighbour(-1, -1)) & (m > neighbour(1, 1))
    ridge |= rising & (m > neighbour(-1, 1)) & (m > neighbour(1, -1))
    return np.where(ridge, m, 0)


def _connected(steepness: np.ndarray, low: float, high: float) -> np.ndarray:
    """Hysteresis: pixels above `high`, and those above `low` that are joined to one by others."""
    padded = np.pad(steepness, 1)
    stride = padded.shape[1]
    edges, weak = padded.ravel() > high, padded.ravel() > low
    around = np.array([y * stride + x for y in (-1, 0, 1) for x in (-1, 0, 1)])
    front = np.flatnonzero(edges)
    while len(front):
        near = np.unique(front[:, None] + around)
        front = near[weak[near] & ~edges[near]]
        edges[front] = True
    return edges.reshape(padded.shape)[1:-1, 1:-1]


def invert(image: Image.Image) -> Image.Image:
    """Black lines on white, as people draw them, become the white lines on black that networks expect."""
    return ImageOps.invert(opaque(image))


def tile(image: Image.Image, factor: int = 4) -> Image.Image:
    """A blurred picture: colours and rough shapes, whose details are to be drawn anew.

    Shrunk to one `factor`-th, each pixel the mean of its area, and enlarged again.
    """
    if factor < 1:
        raise RequestError(f"tiles are blurred by a factor of 1 or more, got {factor}")
    image = opaque(image)
    small = image.resize((max(1, image.width // factor), max(1, image.height // factor)), Resampling.BOX)
    return small.resize(image.size, Resampling.BICUBIC)


def threshold(image: Image.Image, level: int = 127) -> Image.Image:
    """White where the picture is brighter than `level` (0 to 255), black elsewhere."""
    if not 0 <= level <= 255:
        raise RequestError(f"the threshold must be 0 to 255, got {level}")
    return opaque(image).convert("L").point([255 * (value > level) for value in range(256)]).convert("RGB")


def none(image: Image.Image) -> Image.Image:
    """The picture itself: it is a hint already."""
    return image


HINTS: Mapping[str, Hint] = MappingProxyType(
    {"none": none, "canny": canny, "invert": invert, "tile": tile, "threshold": threshold}
)
"""By the names that users write."""
