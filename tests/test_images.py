"""Pictures: rounding, the settings they carry, and files that are whole and never replaced."""

import io
import json
import multiprocessing
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm.errors import LdmError
from ldm.images import MAX_PIXELS, grid, read_text, save, save_numbered, to_pil, with_text


def test_levels_are_rounded_and_clamped():
    values = torch.tensor([-2.0, -1.0, 0.0, 100.6 / 127.5 - 1, 1.0, 3.0]).expand(3, 1, 6)
    assert to_pil(values).getchannel("R").tobytes() == bytes([0, 0, 128, 101, 255, 255])


def test_levels_are_cut_off_as_in_the_web_ui_when_asked():
    values = torch.tensor([-1.0, 100.6 / 127.5 - 1, 0.9999, 1.0]).expand(3, 1, 4)
    assert to_pil(values, truncate=True).getchannel("R").tobytes() == bytes([0, 100, 254, 255])


def test_axes_are_channel_row_column():
    pixels = -torch.ones(3, 2, 4, dtype=torch.float16)
    pixels[2, 1, 3] = 1
    image = to_pil(pixels)
    assert image.size == (4, 2)
    assert image.getpixel((3, 1)) == (0, 0, 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_picture_is_an_error_not_black(value: float):
    pixels = torch.zeros(3, 4, 4)
    pixels[1, 2, 3] = value
    with pytest.raises(LdmError, match="NaN"):
        to_pil(pixels)


@pytest.mark.parametrize("text", ["plain\nSteps: 1", "ünïcode", "日本 🍎", "", "half a pair \udce9"])
def test_the_text_survives_a_plain_save(text: str):
    file = io.BytesIO()
    to_pil(torch.zeros(3, 8, 8), text).save(file, "PNG")
    assert Image.open(file, formats=["PNG"]).info["parameters"] == text.replace("\udce9", "?")


TEXT = "a cat, 日本 🍎\nNegative prompt: dog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1"


def drawn(text: str = TEXT) -> Image.Image:
    return with_text(Image.new("RGB", (16, 16), (200, 30, 60)), text)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_every_kind_of_file_carries_the_text(tmp_path: Path, ending: str):
    path = tmp_path / f"x{ending}"
    save(drawn(), path)
    assert read_text(path) == TEXT
    assert read_text(str(path)) == TEXT
    with Image.open(path) as image:
        assert read_text(image) == TEXT
        if ending in (".jpg", ".webp"):  # as the web UI writes and reads it
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment == b"UNICODE\0" + TEXT.encode("utf-16-be")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_plain_save_carries_the_text(tmp_path: Path, kind: str):
    drawn().save(tmp_path / "x", kind)
    assert read_text(tmp_path / "x") == TEXT


def test_a_picture_in_memory_carries_the_text():
    assert read_text(drawn()) == TEXT


def test_chunks_of_ones_own_stand_beside_ours(tmp_path: Path):
    image = drawn()
    image.encoderinfo["pnginfo"].add_text("author", "me")
    image.save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").info == {"parameters": TEXT, "author": "me"}


def test_a_long_text_needs_another_kind_than_jpeg(tmp_path: Path):
    image = drawn("word " * 20_000)
    with pytest.raises(LdmError, match="too long for a JPEG"):
        save(image, tmp_path / "x.jpg")
    image.save(tmp_path / "y.jpg")  # without the text, but a picture
    for name in ("x.png", "x.webp"):
        save(image, tmp_path / name)
        assert read_text(tmp_path / name) == "word " * 20_000


def test_a_jpeg_is_white_where_the_picture_is_transparent(tmp_path: Path):
    clear = with_text(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "a cat")
    save(clear, tmp_path / "x.jpg")
    assert Image.open(tmp_path / "x.jpg").getpixel((4, 4)) == (255, 255, 255)
    assert read_text(tmp_path / "x.jpg") == "a cat"


def test_other_endings_are_refused(tmp_path: Path):
    with pytest.raises(LdmError, match=r"saved as .png, .jpg, .jpeg, .webp, not as '.xyz'"):
        save(drawn(), tmp_path / "x.xyz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compressed", [False, True])
def test_all_text_chunks_are_read(tmp_path: Path, compressed: bool):
    for text in ("plain", "日本"):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", text, zip=compressed)
        Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=chunks)
        assert read_text(tmp_path / "x.png") == text


def png_with(tmp_path: Path, kind: bytes, data: bytes, size: tuple[int, int] = (4, 4)) -> Path:
    """A PNG with one more chunk behind the pixels, claiming a size."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    png = bytearray(file.getvalue())
    png[16:24] = struct.pack(">II", *size)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path = tmp_path / "made.png"
    path.write_bytes(png[:-12] + chunk + png[-12:])
    return path


def test_text_behind_the_pixels_is_read(tmp_path: Path):
    assert read_text(png_with(tmp_path, b"tEXt", b"parameters\0late")) == "late"


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        (b"UNICODE\0" + "Steps: 1 é".encode("utf-16-be"), "Steps: 1 é"),
        (b"UNICODE\0" + "Steps: 1 é".encode("utf-16-le"), "Steps: 1 é"),
        (b"UNICODE\0" + "Steps: 1 é".encode("utf-16"), "Steps: 1 é"),
        (b"UNICODE\0" + "Steps: 1 é".encode(), "Steps: 1 é"),
        (b"ASCII\0\0\0Steps: 1", "Steps: 1"),
        (bytes(8) + b"Steps: 1", "Steps: 1"),
        (b"Steps: 1, Seed: 2", "Steps: 1, Seed: 2"),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_user_comments_of_all_writers(tmp_path: Path, kind: str, comment: bytes, text: str):
    exif = Image.Exif()
    exif[0x0131] = "a program"  # Pillow writes no empty main record into AVIF
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (16, 16)).save(tmp_path / "x", kind, exif=exif)
    assert read_text(tmp_path / "x") == text


def test_novelai_pictures_are_read(tmp_path: Path):
    chunks = PngImagePlugin.PngInfo()
    settings = {"steps": 28, "sampler": "k_euler_ancestral", "seed": 7, "scale": 11.0, "uc": "lowres"}
    for name, value in {
        "Software": "NovelAI",
        "Description": "{{a cat}}",
        "Comment": json.dumps(settings),
    }.items():
        chunks.add_text(name, value)
    Image.new("RGB", (8, 16)).save(tmp_path / "x.png", pnginfo=chunks)
    assert read_text(tmp_path / "x.png") == (
        "{{a cat}}\nNegative prompt: lowres\nSteps: 28, Sampler: k_euler_ancestral, CFG scale: 11.0, "
        "Seed: 7, Size: 8x16, Clip skip: 2, ENSD: 31337"
    )


@pytest.mark.parametrize("comment", ["[1]", "no json", "[" * 100_000, "{}"])
def test_strange_novelai_chunks_are_no_error(comment: str):
    image = Image.new("RGB", (8, 8))
    image.info |= {"Software": "NovelAI", "Comment": comment, "parameters": "plain"}
    assert read_text(image).startswith("plain" if comment != "{}" else "\nNegative prompt: ")


def test_a_picture_without_text_says_so(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(LdmError, match=r"x\.png holds no settings"):
        read_text(tmp_path / "x.png")


def test_what_is_no_picture_is_told_in_a_line(tmp_path: Path):
    (tmp_path / "note.png").write_text("hello")
    save(drawn(), tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:40])
    Image.new("RGB", (4, 4)).save(tmp_path / "x.bmp")
    for name in ("note.png", "half.jpg", "x.bmp", "missing.png", ".", "a\x1b[31m.png"):
        with pytest.raises(LdmError) as caught:
            read_text(tmp_path / name)
        assert str(caught.value).isprintable()


def test_bombs_are_refused_at_once(tmp_path: Path):
    start = time.process_time()
    side = int(MAX_PIXELS**0.5) + 1
    for size in ((side, side), (10_000, 10_000), (65_000, 65_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(LdmError, match=r"million pixels|cannot be read|damaged"):
            read_text(png_with(tmp_path, b"tEXt", b"a\0b", size))
    for data in (b"parameters\0\0" + zlib.compress(bytes(50_000_000)), b"parameters\0\0junk"):
        with pytest.raises(LdmError):
            read_text(png_with(tmp_path, b"zTXt", data))
    assert time.process_time() - start < 2


def test_damage_anywhere_is_an_error_or_a_text(tmp_path: Path):
    """Each file cut short at every length, and with single bytes changed: never another exception."""
    for ending in (".png", ".jpg", ".webp"):
        save(drawn("Steps: 1"), tmp_path / f"x{ending}", overwrite=True)
        data = (tmp_path / f"x{ending}").read_bytes()
        broken = [data[:n] for n in range(0, len(data), 9)]
        broken += [data[:n] + bytes([data[n] ^ 0x55]) + data[n + 1 :] for n in range(0, len(data), 7)]
        for damaged in broken:
            (tmp_path / "broken").write_bytes(damaged)
            with suppress(LdmError):
                read_text(tmp_path / "broken")


def test_files_are_numbered_after_the_highest(tmp_path: Path):
    image = Image.new("RGB", (4, 4))
    assert save_numbered(image, tmp_path, "42").name == "00000-42.png"
    assert save_numbered(image, tmp_path, "43").name == "00001-43.png"
    (tmp_path / "00000-42.png").unlink()
    (tmp_path / "00012-notes.txt").touch()
    (tmp_path / "unrelated.png").touch()
    assert save_numbered(image, tmp_path, "44").name == "00013-44.png"
    (tmp_path / "99999-1.png").touch()
    assert save_numbered(image, tmp_path, "45").name == "100000-45.png"


def _write(folder: Path, colour: int) -> None:
    for _ in range(20):
        save_numbered(Image.new("RGB", (4, 4), (colour, 0, 0)), folder, "same")


def test_writers_in_one_folder_lose_nothing(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, colour)) for colour in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    colours = [Image.open(path).tobytes()[0] for path in tmp_path.iterdir()]
    assert sorted(colours) == [colour for colour in range(4) for _ in range(20)]


def test_a_file_is_replaced_only_when_told(tmp_path: Path):
    path = tmp_path / "x.png"
    save(with_text(Image.new("RGB", (4, 4)), "first"), path)
    with pytest.raises(LdmError, match=r"x\.png exists already"):
        save(with_text(Image.new("RGB", (4, 4)), "second"), path)
    assert Image.open(path).info["parameters"] == "first"
    save(with_text(Image.new("RGB", (4, 4)), "second"), path, overwrite=True)
    assert Image.open(path).info["parameters"] == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_grid_puts_pictures_row_by_row():
    images = [with_text(Image.new("RGB", (2, 1), (i, 0, 0)), f"text {i}") for i in range(1, 6)]
    sheet = grid(images)
    assert sheet.size == (6, 2)
    assert [sheet.getpixel((x, y)) for y in (0, 1) for x in (0, 2, 4)] == [
        (i, 0, 0) for i in (1, 2, 3, 4, 5, 0)
    ]
    assert sheet.info["parameters"] == "text 1"
