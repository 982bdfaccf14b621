"""A given picture as a run works on it, and the way of the result back into it.

Everything here is in pixels: sizes, masks, cutting out and pasting. The order of the steps is the web UI's.
"""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ldm import color, masks
from ldm.edit import Edit
from ldm.images import opaque
from ldm.inputs import Inputs
from ldm.masks import Box
from ldm.resize import Mode, resized


@dataclass(frozen=True, eq=False)
class Canvas:
    """All pictures are RGB and of the size of the run, all masks "L" with white for what is repainted."""

    picture: Image.Image
    start: Image.Image  # the same, but perhaps filled behind the mask; for "latent", of its own size
    mask: Image.Image | None
    color_correction: bool
    original: Image.Image  # RGB or RGBA, the picture into which the result goes
    seam: Image.Image | None  # the mask for that, of the size of `original`
    box: Box | None  # the part of `original` that is drawn; None: all of it
    size: tuple[int, int]  # of the picture as it was given
    mode: Mode  # how it was made to fit

    def like(self, image: Image.Image) -> Image.Image:
        """Another picture of the same scene, such as its depth or edges, made to fit as the picture was."""
        image = resized(image, *self.size)
        return resized(image if self.box is None else image.crop(self.box), *self.picture.size, self.mode)

    def finished(self, drawn: Image.Image, change: Tensor | None = None) -> Image.Image:
        """The result of a run as a picture to keep: what the mask keeps is as it was, to the byte.

        change: of soft inpainting, see `ldm.masks.pasted`. Raises LdmError if anything else were changed.
        """
        if self.color_correction:
            drawn = color.matched(drawn, self.picture)
        if self.seam is None:
            return drawn
        return masks.pasted(self.original, drawn, self.seam, self.box, change)


def fitted(image: Image.Image, usual: int, multiple: int) -> tuple[int, int]:
    """The width and height to work on a picture in, where the user names none: about its own.

    usual: side of the squares that the model was trained on. Beyond twice that, and below half, models draw
    nonsense; such a picture is worked on in its own shape with the usual number of pixels.
    """
    width, height = image.size
    scale = 1.0
    if not usual / 2 <= (width * height) ** 0.5 <= usual * 2:
        scale = usual / (width * height) ** 0.5
    return tuple(max(round(side * scale / multiple), 1) * multiple for side in (width, height))  # type: ignore[return-value]


def canvas(inputs: Inputs, edit: Edit, width: int, height: int, *, keep_size: bool) -> Canvas:
    """Prepare the picture of `inputs`, and the mask if there is one, for a run of this size.

    keep_size: the result of inpainting has the size of the picture, whatever the size of the run.
    Raises RequestError if nothing is masked.
    """
    assert inputs.picture is not None
    picture = opaque(inputs.picture)
    if inputs.mask is None:
        mode = "resize" if edit.resize == "latent" else edit.resize
        fit = resized(picture, width, height, mode)
        start = picture if edit.resize == "latent" else fit
        return Canvas(fit, start, None, edit.color_correction, picture, None, None, picture.size, mode)

    mask = masks.from_picture(inputs.mask)
    mask = masks.prepared(mask, picture.size, invert=edit.mask_invert, blur=edit.mask_blur)
    area = masks.region(mask, edit.padding)
    original = as_given if (as_given := inputs.picture).mode in ("RGB", "RGBA") else picture
    seam, box, size = mask, None, picture.size
    if edit.only_masked:
        box = masks.expanded(area, (width, height), picture.size)
        picture, mask, mode = picture.crop(box), mask.crop(box), "fill"
    elif keep_size:
        mode = "fill"  # which `masks.pasted` takes back
    else:
        mode = "resize" if edit.resize == "latent" else edit.resize
        original = resized(picture, width, height, mode)
        seam = resized(mask, width, height, mode)
    picture, mask = resized(picture, width, height, mode), resized(mask, width, height, mode)
    start = picture if edit.masked_content == "original" else masks.filled(picture, mask)
    return Canvas(picture, start, mask, edit.color_correction, original, seam, box, size, mode)
