"""Give a picture the colours of another one, with its own light and shade.

Image to image drifts: each round is a little more purple, or more contrasty. The correction of the web UI
matches the distribution of each channel in CIELAB to that of the original, then takes the brightness back
from the picture itself, so that only hue and colourfulness change.
"""

import numpy as np
from PIL import Image

Pixels = np.ndarray
"""(H, W, 3) float64."""

# sRGB (IEC 61966-2-1): linear RGB to CIE XYZ, rows scaled so that white is 1, 1, 1.
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_XYZ /= _XYZ.sum(axis=1, keepdims=True)
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_BEND = 6 / 29  # where CIELAB's cube root becomes a straight line


def matched(image: Image.Image, reference: Image.Image) -> Image.Image:
    """An RGB picture with the colours of the reference, an RGB picture of any size."""
    pixels, wanted = (to_lab(np.asarray(one.convert("RGB")) / 255) for one in (image, reference))
    channels = [match_histogram(pixels[..., i], wanted[..., i]) for i in range(3)]
    coloured = to_rgb(np.stack(channels, axis=-1))
    result = with_luminosity(coloured, np.asarray(image.convert("RGB")) / 255)
    return Image.fromarray((result * 255).round().astype(np.uint8))


def to_lab(rgb: Pixels) -> Pixels:
    """sRGB in [0, 1] to CIELAB under D65: lightness 0 to 100, a (red) and b (yellow) about -100 to 100."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ _XYZ.T
    f = np.where(xyz > _BEND**3, np.cbrt(xyz), xyz / (3 * _BEND**2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def to_rgb(lab: Pixels) -> Pixels:
    """CIELAB to sRGB; colours that a screen cannot show are clipped to [0, 1]."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > _BEND, f**3, 3 * _BEND**2 * (f - 4 / 29))
    linear = np.clip(xyz @ np.linalg.inv(_XYZ).T, 0, 1)
    return np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def match_histogram(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Replace each value by the one of `wanted` that the same share of pixels does not exceed."""
    _, place, own_counts = np.unique(values, return_inverse=True, return_counts=True)
    targets, counts = np.unique(wanted, return_counts=True)
    new = np.interp(own_counts.cumsum() / values.size, counts.cumsum() / wanted.size, targets)
    return new[place].reshape(values.shape)


def with_luminosity(colour: Pixels, light: Pixels) -> Pixels:
    """The hue and colourfulness of one picture with the brightness of another: the blend mode "luminosity".

    Both in [0, 1]. What leaves that range is drawn towards grey, at the same brightness. W3C Compositing and
    Blending Level 1, section 8.
    """
    luma = (light @ _LUMA)[..., None]  # (H, W, 1)
    shifted = colour + luma - (colour @ _LUMA)[..., None]
    low, high = shifted.min(axis=-1, keepdims=True), shifted.max(axis=-1, keepdims=True)
    room = np.minimum(
        np.where(low < 0, luma / np.maximum(luma - low, 1e-12), 1),
        np.where(high > 1, (1 - luma) / np.maximum(high - luma, 1e-12), 1),
    )
    return np.clip(luma + (shifted - luma) * room, 0, 1)
