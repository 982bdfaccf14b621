"""From decoded pixels to picture files that say how they were made; pictures and that text from any file."""

import io
import json
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ldm.errors import LdmError
from ldm.files import atomic_write
from ldm.formats.mapped import printable, reason
from ldm.infotext import quote

ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""The kinds of files that are written, by the ending of their names."""

READABLE = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
MAX_PIXELS = 64_000_000  # of a picture from outside: a small file may claim to be a huge one

_MAX_SEGMENT = (
    65_000  # bytes of EXIF data or of a comment in a JPEG, whose segments have 16 bits for their size
)
_EXIF_IFD, _USER_COMMENT, _ORIENTATION = 0x8769, 0x9286, 0x0112  # tags of the EXIF standard

_UPRIGHT = {  # what undoes each way of holding the camera; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_pil(pixels: Tensor, text: str | None = None, *, truncate: bool = False) -> Image.Image:
    """Turn decoded pixels (3, H, W) in [-1, 1] into a picture; values beyond are clamped.

    text: the settings, see `with_text`.
    truncate: cut the fraction of a level off, as the web UI does, instead of rounding to the nearest.
    Raises LdmError if there is a NaN or an infinity: a network failed, and the picture would be black.
    """
    pixels = pixels.detach().float().cpu()
    if not torch.isfinite(pixels).all():
        raise LdmError(
            "the picture came out as NaN or infinity; load the model with dtype float32 (or bfloat16)"
        )
    levels = (pixels.clamp(-1, 1) + 1) * 127.5
    levels = (levels if truncate else levels.round()).to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())  # (H, W, 3)
    return image if text is None else with_text(image, text)


def to_tensor(image: Image.Image, device: torch.device | str = "cpu") -> Tensor:
    """An RGB picture as an autoencoder reads it: (1, 3, H, W) float32 in [-1, 1]."""
    levels = torch.from_numpy(np.array(image, dtype=np.float32))  # (H, W, 3)
    return (levels / 127.5 - 1).permute(2, 0, 1).unsqueeze(0).to(device)


def with_text(image: Image.Image, text: str) -> Image.Image:
    """Let a picture carry its settings: in `info`, as if read from a file, and into what it is saved to.

    A plain `image.save("x.png")` writes them as a text chunk "parameters", as the web UI does; one to a JPEG
    or GIF writes a comment. For EXIF data, which more tools read, and for WebP there is `save`. More chunks
    go into the same record, `image.encoderinfo["pnginfo"].add_text("author", "me")`: beside it, an argument
    `pnginfo=` of `image.save` has no effect.
    """
    # Half a surrogate pair, from a badly encoded command line, fits into no file.
    data = text.encode("utf-8", "replace")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", data.decode())
    image.info["parameters"] = text
    # Pillow writes no text from `info`, but takes the options of `save` from here, too.
    image.encoderinfo = {"pnginfo": chunks, "comment": data if len(data) <= _MAX_SEGMENT else b""}
    return image


def read_text(picture: str | os.PathLike[str] | Image.Image) -> str:
    """The settings that a picture carries, whoever wrote them; `ldm.infotext.parse` takes them apart.

    picture: a PNG (text chunks), JPEG, WebP or AVIF (EXIF user comment), GIF or JPEG (comment). What kind it
        is, its content decides. The text of NovelAI's pictures is put into the layout of the others.
    Raises LdmError if it is no such file, damaged, too large, or holds no settings.
    """
    if isinstance(picture, Image.Image):
        name, text = "the picture", _text(picture)
    else:
        name = printable(Path(picture).name)
        with _opened(Path(picture)) as image:
            try:
                text = _text(image)
                if text is None and image.format == "PNG":
                    image.load()  # some tools write their text behind the pixels
                    text = _text(image)
            except _DAMAGE as error:
                raise LdmError(f"{name}: the picture is damaged: {reason(error)}") from None
    if text is None:
        raise LdmError(f"{name} holds no settings; web sites and editors often remove them")
    return text


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture to draw from: RGB with 8 bits a channel, or RGBA where any of it is transparent.

    path: a PNG, JPEG, WebP, AVIF or GIF, decided by its content. It is turned upright where its EXIF data
        say how the camera was held; of an animation, it is the first picture. 16 bits are scaled to 8.
    The numbers stay those of the file: a colour profile is not applied but handed on in `info`, for `save`.
        (That of CMYK is not; its inks become colours by the plain rule.)
    Raises LdmError if it is no such file, damaged or cut short, or larger than MAX_PIXELS.
    """
    path = Path(path)
    try:
        with _opened(path) as image:
            image.verify()  # the check sums of a PNG, which decoding passes over
        with _opened(path) as image:
            profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
            image = _upright(_rgb(image))
    except LdmError:  # which is a ValueError, too
        raise
    except _DAMAGE as error:
        raise LdmError(f"{printable(path.name)}: the picture is damaged: {reason(error)}") from None
    image.info = {"icc_profile": profile} if profile else {}
    return image


def opaque(image: Image.Image, colour: str | tuple[int, int, int] = "white") -> Image.Image:
    """A picture in RGB; what is transparent shows this colour. Networks know no transparency."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def _rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode that the formats have, not yet decoded, as RGB or RGBA."""
    tiles = getattr(image, "tile", None)
    raw = tiles[0].args if tiles else None  # how the file stores its pixels
    key = image.info.get("transparency")  # of a PNG: the alphas of a palette, or the one transparent colour
    image.load()
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow would clip them to 255
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
        if key is not None:
            image.putalpha(Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8)))
    # That colour is told in the bits of the file, 2, 4 or 16; Pillow compares it in 8.
    elif raw in ("L;2", "L;4") and key is not None:
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B" and key is not None:
        image.info["transparency"] = tuple(level >> 8 for level in key)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    return image


def _upright(image: Image.Image) -> Image.Image:
    with suppress(*_DAMAGE):  # of the EXIF data, not of the picture
        orientation = image.getexif().get(_ORIENTATION)
        if orientation in _UPRIGHT:
            return image.transpose(_UPRIGHT[orientation])
    return image


# What Pillow raises for the many ways in which a file can be broken.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    name = printable(path.name)
    if not path.exists():
        raise LdmError(f"there is no file {printable(str(path), 150)}")
    if not path.is_file():
        raise LdmError(f"{printable(str(path), 140)} is a folder or a device; give the path of a picture")
    too_large = LdmError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels; it is not read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage that does not keep the text from being read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(path, formats=READABLE)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise too_large from None
        except UnidentifiedImageError:
            raise LdmError(f"{name} is no PNG, JPEG, WebP, AVIF or GIF picture, or damaged") from None
        except _DAMAGE as error:
            raise LdmError(f"{name} cannot be read: {reason(error)}") from None
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise too_large
            yield image


def _text(image: Image.Image) -> str | None:
    if image.info.get("Software") == "NovelAI" and (text := _novelai(image)):
        return text
    if image.info.get("parameters"):
        return str(image.info["parameters"])
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and (text := _decoded(comment)):
        return text
    comment = image.info.get("comment", "")
    return (comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)) or None


def _decoded(comment: bytes) -> str:
    """An EXIF user comment: eight letters that name the encoding, and the text.

    "UNICODE" is UTF-16 in an order of bytes that the standard leaves open: the web UI writes the high byte
    first, others the order of the file. Letters of English have a zero as high byte, which tells them apart;
    without any zero it is UTF-8 under a wrong name.
    """
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
            encoding = "utf-16"
        elif 0 not in text:
            encoding = "utf-8"
        else:
            encoding = "utf-16-be" if text[::2].count(0) >= text[1::2].count(0) else "utf-16-le"
        return text.decode(encoding, "replace").strip("\0")
    named = code in (b"ASCII\0\0\0", bytes(8))
    return (text if named else comment).decode("utf-8", "replace").strip("\0")


def _novelai(image: Image.Image) -> str | None:
    """NovelAI's chunks as a text of settings. Its models were used with clip skip 2 and the ENSD 31337."""
    try:
        settings = json.loads(str(image.info.get("Comment", "")))
    except (ValueError, RecursionError):
        return None
    if not isinstance(settings, dict):
        return None
    names = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "scale", "Seed": "seed"}
    fields = [f"{name}: {quote(str(settings.get(key, '')))}" for name, key in names.items()]
    fields += [f"Size: {image.width}x{image.height}", "Clip skip: 2", "ENSD: 31337"]
    prompt, negative = image.info.get("Description", settings.get("prompt", "")), settings.get("uc", "")
    return f"{prompt}\nNegative prompt: {negative}\n{', '.join(fields)}"


def save(
    image: Image.Image, path: str | os.PathLike[str], *, quality: int = 90, overwrite: bool = False
) -> None:
    """Write a picture file, whole or not at all, with the settings that the picture carries.

    path: ending in .png (the pixels as they are), .jpg, .jpeg or .webp (smaller, and not quite the same).
        A JPEG is white where the picture is transparent.
    quality: of the last three, 1 to 100.

    Raises LdmError if `path` exists and `overwrite` is False, for another ending, or if the settings are too
    long for a JPEG; OSError if the disk is full or the like.
    """
    kind = ENDINGS.get(Path(path).suffix.lower())
    if kind is None:
        raise LdmError(f"pictures are saved as {', '.join(ENDINGS)}, not as '{Path(path).suffix}'")
    data = _encoded(image, kind, quality)
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(data)


def save_numbered(image: Image.Image, folder: str | os.PathLike[str], name: str) -> Path:
    """Save as the next picture of a folder, such as 00007-name.png, and return its path.

    The number follows the highest one there, whatever was deleted in between. A file that another process
    makes at the same moment is never replaced: its number is skipped.
    """
    data = _encoded(image, "PNG")
    number = next_number(folder)
    while True:
        path = numbered(folder, number, name)
        try:
            with atomic_write(path) as file:
                file.write(data)
            return path
        except LdmError:  # the name was taken meanwhile
            number += 1


def next_number(folder: str | os.PathLike[str]) -> int:
    """The number of the next picture of a folder."""
    taken = (re.match(r"\d{5,}(?=-)", path.name) for path in Path(folder).iterdir())
    return max((int(match[0]) for match in taken if match), default=-1) + 1


def numbered(folder: str | os.PathLike[str], number: int, name: str) -> Path:
    """The path of a picture in a folder of numbered ones."""
    return Path(folder) / f"{number:05d}-{name}.png"


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures on one sheet, row by row. It carries the first one's text.

    columns: pictures in a row; None: so many that the sheet is about as high as wide.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    text = images[0].info.get("parameters")
    return sheet if text is None else with_text(sheet, text)


def _encoded(image: Image.Image, kind: str, quality: int = 90) -> bytes:
    data = io.BytesIO()
    text = image.info.get("parameters")
    if kind == "JPEG" and image.has_transparency_data:
        image = opaque(image)
    if kind == "PNG" or text is None:
        image.save(data, format=kind, quality=quality)
        return data.getvalue()
    exif = Image.Exif()
    # The layout of the web UI.
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    if kind == "JPEG" and len(exif.tobytes()) > _MAX_SEGMENT:
        raise LdmError("the settings are too long for a JPEG; save the picture as .png or .webp")
    image.copy().save(data, format=kind, quality=quality, exif=exif)  # a copy has no options of its own
    return data.getvalue()
