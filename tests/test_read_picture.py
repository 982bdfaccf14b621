"""Reading pictures to draw from: every kind comes as upright 8-bit RGB(A), or a sentence says why not."""

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import LdmError
from ldm.images import MAX_PIXELS, opaque, read_picture, read_text, save, with_text


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth picture with four different corners."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / (width - 1), 255 * y / (height - 1), 128 + 0 * x]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, row: bytes, width: int, *more: bytes) -> bytes:
    """A PNG of one row, of any depth and kind of colour (0 grey, 2 RGB, 3 palette, 4 grey + alpha)."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + chunk(b"IEND", b"")


def read(tmp_path: Path, data: bytes) -> Image.Image:
    (tmp_path / "x").write_bytes(data)
    return read_picture(tmp_path / "x")


def levels(image: Image.Image) -> list:
    return np.asarray(image).reshape(-1, len(image.getbands())).tolist()


@pytest.mark.parametrize(
    ("kind", "error"), [("PNG", 0), ("WEBP", 24), ("JPEG", 24), ("AVIF", 24), ("GIF", 40)]
)  # what the format loses of a smooth picture
def test_every_format_is_read_by_its_content(tmp_path: Path, kind: str, error: int):
    scene().save(tmp_path / "named.wrong", kind)
    image = read_picture(str(tmp_path / "named.wrong"))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(scene()).astype(int)).max() <= error


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path: Path, kind: str, orientation: int):
    """Stored as the camera was held, with the tag that says so. EXIF 2.32, tag 0x0112."""
    how = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what a camera does to the picture: Pillow's numbers
    held = scene() if orientation == 1 else scene().transpose(Image.Transpose(how[orientation]))
    exif = Image.Exif()
    exif[0x0131] = "a camera"
    exif[0x0112] = orientation
    held.save(tmp_path / "x", kind, exif=exif)
    image = read_picture(tmp_path / "x")
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(scene()).astype(int)).max() <= 24
    assert "exif" not in image.info  # which would turn it again when it is shown


def test_damaged_exif_data_do_not_keep_a_picture_from_being_read(tmp_path: Path):
    scene().save(tmp_path / "x", "JPEG", exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff")
    assert read_picture(tmp_path / "x").size == (48, 32)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # 16 bits: divided by 257 and rounded, where clipping would leave white only.
        (png(16, 0, struct.pack(">4H", 0, 257, 32896, 65535), 4), [[v] * 3 for v in (0, 1, 128, 255)]),
        (png(16, 2, struct.pack(">3H", 0xFF80, 0x7FFF, 0x0180), 1), [[255, 127, 1]]),
        (png(16, 4, struct.pack(">4H", 0, 256, 32768, 65535), 2), [[0, 0, 0, 1], [128, 128, 128, 255]]),
        (png(1, 0, b"\xa0", 4), [[v] * 3 for v in (255, 0, 255, 0)]),
        (png(2, 0, b"\x1b", 4), [[v] * 3 for v in (0, 85, 170, 255)]),
        (png(8, 4, bytes([9, 255, 7, 255]), 2), [[9, 9, 9], [7, 7, 7]]),  # an alpha that hides nothing
        (png(8, 4, bytes([9, 255, 7, 0]), 2), [[9, 9, 9, 255], [7, 7, 7, 0]]),
        (png(8, 3, b"\0\1", 2, chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6]))), [[1, 2, 3], [4, 5, 6]]),
        (
            png(8, 3, b"\0\1", 2, chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6])), chunk(b"tRNS", b"\x80")),
            [[1, 2, 3, 128], [4, 5, 6, 255]],
        ),
        # One transparent level or colour, in the bits of the file.
        (png(4, 0, b"\x1b", 2, chunk(b"tRNS", b"\0\x0b")), [[17] * 3 + [255], [187] * 3 + [0]]),
        (png(16, 0, b"\1\0\2\0", 2, chunk(b"tRNS", b"\2\0")), [[1, 1, 1, 255], [2, 2, 2, 0]]),
        (png(16, 0, b"\1\0\2\0", 2, chunk(b"tRNS", b"\2\1")), [[1, 1, 1], [2, 2, 2]]),
        (png(8, 2, b"\1\2\3\4\5\6", 2, chunk(b"tRNS", b"\0\4\0\5\0\6")), [[1, 2, 3, 255], [4, 5, 6, 0]]),
        (png(16, 2, b"\1\2\3\4\5\6", 1, chunk(b"tRNS", b"\1\2\3\4\5\6")), [[1, 3, 5, 0]]),
    ],
)  # fmt: skip
def test_every_depth_and_kind_of_png(tmp_path: Path, data: bytes, expected: list):
    image = read(tmp_path, data)
    assert image.mode == ("RGB" if len(expected[0]) == 3 else "RGBA")
    assert levels(image) == expected


def test_cmyk_is_ink_on_white(tmp_path: Path):
    """Adobe's JPEGs store the inks inverted, as every reader takes them."""
    inks = {(0, 0, 0, 0): 255, (0, 0, 0, 255): 0, (0, 0, 0, 128): 127}
    for ink, grey in inks.items():
        Image.new("CMYK", (16, 16), ink).save(tmp_path / "x", "JPEG", quality=100)
        assert np.abs(np.asarray(read_picture(tmp_path / "x")).astype(int) - grey).max() <= 2
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "x", "JPEG", quality=100)  # cyan
    assert np.abs(np.asarray(read_picture(tmp_path / "x")).astype(int) - [0, 255, 255]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "AVIF"])
def test_of_an_animation_the_first_picture_is_read(tmp_path: Path, kind: str):
    first, second = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))
    first.save(tmp_path / "x", kind, save_all=True, append_images=[second])
    assert np.abs(np.asarray(read_picture(tmp_path / "x")).astype(int) - [200, 0, 0]).max() <= 8


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "AVIF"])
def test_transparency_is_kept(tmp_path: Path, kind: str):
    image = scene().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 24, 32))
    image.save(tmp_path / "x", kind)
    alpha = read_picture(tmp_path / "x").getchannel("A")
    assert np.asarray(alpha)[:, :20].max() <= 4
    assert np.asarray(alpha)[:, 28:].min() >= 251


def test_a_colour_profile_is_handed_on(tmp_path: Path):
    scene().save(tmp_path / "x.png", icc_profile=b"a profile", pnginfo=None)
    assert read_picture(tmp_path / "x.png").info == {"icc_profile": b"a profile"}
    Image.new("CMYK", (8, 8)).save(tmp_path / "y.jpg", icc_profile=b"of inks")
    assert read_picture(tmp_path / "y.jpg").info == {}


def test_networks_see_a_colour_behind_what_is_transparent():
    image = Image.new("RGBA", (1, 1), (0, 100, 200, 0))
    assert levels(opaque(image)) == [[255, 255, 255]]
    assert levels(opaque(image, (1, 2, 3))) == [[1, 2, 3]]
    image.putalpha(128)
    assert np.abs(np.array(levels(opaque(image))) - [[127, 177, 227]]).max() <= 1
    assert opaque(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF"])
def test_a_picture_cut_short_is_refused(tmp_path: Path, kind: str):
    file = io.BytesIO()
    scene().save(file, kind)
    data = file.getvalue()
    for share in (0.05, 0.3, 0.6, 0.9):
        with pytest.raises(LdmError) as caught:
            read(tmp_path, data[: int(len(data) * share)])
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) <= 200


def test_every_changed_byte_of_a_png_is_seen(tmp_path: Path):
    """Pillow alone decodes many of them to a wrong picture."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(file, "PNG")
    data = file.getvalue()
    for n in range(8, len(data) - 12):  # behind that, an empty chunk marks the end
        with pytest.raises(LdmError):
            read(tmp_path, data[:n] + bytes([data[n] ^ 0x10]) + data[n + 1 :])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "AVIF"])
def test_damage_never_raises_another_error(tmp_path: Path, kind: str):
    file = io.BytesIO()
    scene().save(file, kind)
    data = file.getvalue()
    for n in range(0, len(data), max(1, len(data) // 150)):
        with suppress(LdmError):  # a change that cannot be seen leaves a picture
            image = read(tmp_path, data[:n] + bytes([data[n] ^ 0x55]) + data[n + 1 :])
            assert image.mode in ("RGB", "RGBA")


def test_what_is_no_picture_is_told_in_a_line(tmp_path: Path):
    (tmp_path / "note.png").write_text("hello")
    scene().save(tmp_path / "x.bmp")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8001, 8001, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    assert MAX_PIXELS < 8001 * 8001
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("note.png", "x.bmp", "bomb.png", "pipe.png", "missing.png", ".", "a\x1b[31m.png"):
        with pytest.raises(LdmError) as caught:
            read_picture(tmp_path / name)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", [None, "Steps: 1"])
def test_a_transparent_picture_is_saved_as_jpeg_on_white(tmp_path: Path, text: str | None):
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    save(image if text is None else with_text(image, text), tmp_path / "x.jpg")
    assert levels(read_picture(tmp_path / "x.jpg"))[0] == [255, 255, 255]
    assert text is None or read_text(tmp_path / "x.jpg") == text
