"""Masks for inpainting: where they come from, what they cover, and how the result goes back into the picture.

A mask is a grey picture ("L") of the size of the picture: white is repainted, black stays, and what stays is
the same to the last bit in the end. The rules are those of the web UI unless said otherwise.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ldm.errors import LdmError, RequestError
from ldm.resize import resized

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, the last two just outside."""


def from_picture(image: Image.Image) -> Image.Image:
    """The mask that a picture shows: its brightness; of one with transparent parts, what is painted on it."""
    if image.mode == "RGBA":
        return image.getchannel("A").point([0] * 129 + [255] * 127)
    return image.convert("L")


def from_alpha(picture: Image.Image) -> Image.Image:
    """The mask of what a picture leaves open: every pixel that is not quite opaque. Raises RequestError."""
    if picture.mode != "RGBA":
        raise RequestError(
            "the picture has no transparent part to repaint; give a mask (--mask, --box), or erase a part"
        )
    return picture.getchannel("A").point([255] * 255 + [0])


def from_box(box: str | Sequence[int], size: tuple[int, int]) -> Image.Image:
    """A white rectangle for a picture of this size. box: (left, top, right, bottom) or "20,30,120,90".

    Raises RequestError if that is no rectangle or lies outside the picture.
    """
    parts = box.split(",") if isinstance(box, str) else [str(side) for side in box]
    try:
        left, top, right, bottom = (int(part) for part in parts)
    except ValueError:
        raise RequestError(
            f"a box is four whole numbers, left,top,right,bottom, such as 20,30,120,90; got {box!r}"
        ) from None
    width, height = size
    if not (left < right and top < bottom and left < width and top < height and right > 0 and bottom > 0):
        raise RequestError(
            f"the box {left},{top},{right},{bottom} (left,top,right,bottom) covers nothing of the "
            f"{width}x{height} picture"
        )
    mask = Image.new("L", size)
    mask.paste(255, (left, top, right, bottom))
    return mask


def prepared(
    mask: Image.Image, size: tuple[int, int], *, invert: bool = False, blur: float = 0
) -> Image.Image:
    """Fit a mask to a picture of this size, invert it, soften its edge.

    Raises RequestError if it has another shape than the picture.
    """
    width, height = size
    if not same_shape(mask.size, size):
        raise RequestError(
            f"the mask is {mask.width}x{mask.height}, the picture {width}x{height}; their shapes must match"
        )
    mask = resized(mask.convert("L"), width, height)
    return blurred(ImageOps.invert(mask) if invert else mask, blur)


def same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have the same proportions, but for a few pixels."""
    across, down = a[0] * b[1], b[0] * a[1]
    return abs(across - down) <= max(across, down) / 50


def blurred(mask: Image.Image, sigma: float) -> Image.Image:
    """Soften a mask with a bell curve of `sigma` pixels, cut off at two and a half of them.

    Rows, then columns, each rounded to whole levels and reflected at the borders, as OpenCV does it for the
    web UI. Pillow's own blur, which older versions used, is an approximation and differs by up to 6 levels.
    """
    radius = int(2.5 * sigma + 0.5)
    if radius == 0:
        return mask
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    bell = torch.exp(-(distance**2) / (2 * sigma**2))
    bell = (bell / bell.sum()).float()[None, None]  # (1, 1, 2 * radius + 1)
    rows = np.asarray(mask, dtype=np.float32)  # (H, W)
    for _ in range(2):
        padded = torch.from_numpy(np.pad(rows, ((0, 0), (radius, radius)), mode="reflect"))
        rows = torch.floor(F.conv1d(padded[:, None], bell)[:, 0] + 0.5).numpy().T  # turned: then columns
    return Image.fromarray(rows.astype(np.uint8))


def region(mask: Image.Image, padding: int = 0) -> Box:
    """The smallest box around all that is not black, and `padding` pixels more, within the picture.

    Raises RequestError if the mask is black.
    """
    box = mask.getbbox()
    if box is None:
        raise RequestError("the mask is empty: nothing of it is white; draw one, or invert it")
    left, top, right, bottom = box
    return (
        max(left - padding, 0),
        max(top - padding, 0),
        min(right + padding, mask.width),
        min(bottom + padding, mask.height),
    )


def expanded(box: Box, shape: tuple[int, int], within: tuple[int, int]) -> Box:
    """Widen a box until it has the proportions of `shape` (width, height), or the picture ends.

    within: size of the picture. The box grows on both sides alike, and is moved inside if it sticks out.
    """
    left, top, right, bottom = box
    ratio = shape[0] / shape[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grown(top, bottom, int((right - left) / ratio - (bottom - top)), within[1])
    else:
        left, right = _grown(left, right, int((bottom - top) * ratio - (right - left)), within[0])
    return left, top, right, bottom


def _grown(low: int, high: int, more: int, limit: int) -> tuple[int, int]:
    low, high = low - more // 2, high + more - more // 2
    low -= max(high - limit, 0)  # what sticks out on one side is added to the other
    high = min(high, limit) - min(low, 0)
    return max(low, 0), min(high, limit)


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Cover the masked part of an RGB picture with the colours around it, ever blurrier towards its middle.

    Blurs of the rest, which is transparent where it is masked, lie on top of each other, the widest below.
    """
    rest = Image.new("RGBa", picture.size)  # small a: colours times alpha, so that blurs do not grow dark
    rest.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    canvas = Image.new("RGBA", picture.size)
    for radius, times in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        layer = rest.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            canvas.alpha_composite(layer)
    return canvas.convert("RGB")


def latent_mask(mask: Image.Image, width: int, height: int, *, rounded: bool = True) -> Tensor:
    """The mask for latents of this size, (1, 1, h, w) float32: 1 is repainted, 0 stays.

    rounded: to 0 or 1, for a sampler that either keeps a pixel or does not.
    """
    levels = np.asarray(mask.resize((width, height))).astype(np.float32) / 255
    shares = torch.from_numpy(levels)[None, None]
    return shares.round() if rounded else shares


def pasted(
    original: Image.Image,
    drawn: Image.Image,
    mask: Image.Image,
    box: Box | None = None,
    change: Tensor | None = None,
) -> Image.Image:
    """Put what was drawn into the original, through the mask. Every pixel where the mask is 0 stays as it is.

    original: RGB or RGBA. Where it is transparent, what is drawn makes it opaque.
    drawn: the whole picture drawn anew, or the part of it in `box`; scaled to fit.
    mask: of the original's size, blurred. Of the whole picture, the result shows fully where the mask is at
        least half, so that its blur reaches outwards only; of a part, as far as the mask says.
    change: soft inpainting: (1, 1, h, w), how much of each latent pixel to show (`soft_inpainting.visible`),
        but never more than the mask allows.
    Raises LdmError as `check_untouched` does, which would be a bug.
    """
    whole = (0, 0, *original.size)
    box = box or whole
    shares = np.asarray(mask).astype(np.uint16)  # (H, W)
    if box == whole or change is not None:
        shares = np.minimum(2 * shares, 255)
    if change is not None:
        shares = np.minimum(shares, np.asarray(_shown(change, drawn.size, original.size, box)))
    seen = Image.new("L", original.size)
    seen.paste(Image.fromarray(shares.astype(np.uint8)).crop(box), box[:2])
    result = original.copy()
    result.info = {name: original.info[name] for name in ("icc_profile",) if name in original.info}
    if touched := seen.getbbox():
        part = Image.new("RGB", original.size)
        part.paste(resized(drawn.convert("RGB"), box[2] - box[0], box[3] - box[1], "crop"), box[:2])
        result.paste(_mixed(original.crop(touched), part.crop(touched), seen.crop(touched)), touched[:2])
    check_untouched(original, result, seen)
    if result.mode == "RGBA" and result.getchannel("A").getextrema() == (255, 255):
        return result.convert("RGB")
    return result


def check_untouched(original: Image.Image, result: Image.Image, mask: Image.Image) -> None:
    """Raise LdmError unless every pixel where the mask is 0 is the same, all pictures being of one size."""
    outside = np.asarray(mask) == 0
    if (np.asarray(result)[outside] != np.asarray(original)[outside]).any():
        raise LdmError(
            "a pixel outside the mask was changed, so the picture is withheld; please report this bug"
        )


def _shown(change: Tensor, drawn: tuple[int, int], original: tuple[int, int], box: Box) -> Image.Image:
    """How much of each pixel of the original may change, from how much each latent pixel did."""
    levels = Image.fromarray((change[0, 0].clamp(0, 1) * 255).to(torch.uint8).cpu().numpy())
    smooth = resized(levels, *drawn, "fill").filter(ImageFilter.GaussianBlur(4))  # pixels, against steps
    shown = Image.new("L", original)
    shown.paste(resized(smooth, box[2] - box[0], box[3] - box[1], "crop"), box[:2])
    return shown


def _mixed(below: Image.Image, above: Image.Image, shares: Image.Image) -> Image.Image:
    """`above` (RGB) over `below` (RGB or RGBA) as far as `shares` (L) says, in the mode of `below`."""
    if below.mode == "RGB":
        return Image.composite(above, below, shares)  # exact for 0 and 255
    # Colours count as far as they are opaque: what lies hidden below must not shine through at the edge.
    share = np.asarray(shares).astype(np.float32)[..., None] / 255  # (H, W, 1)
    under = np.asarray(below).astype(np.float32)
    weight = under[..., 3:] * (1 - share)
    alpha = weight + 255 * share
    colour = (under[..., :3] * weight + np.asarray(above) * (255 * share)) / np.maximum(alpha, 1e-6)
    mixed = np.concatenate([colour, alpha], axis=-1).round().astype(np.uint8)
    return Image.fromarray(np.where(share == 0, np.asarray(below), mixed))
